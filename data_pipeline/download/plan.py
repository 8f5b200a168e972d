"""The parts of a download, and their recorded plans."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline import shards
from data_pipeline.failures import DownloadStats
from data_pipeline.select.selection import footer_hash
from vdtrain.config.data_schema import DownloadConfig
from vdtrain.data.manifest import PLAN
from vdtrain.errors import ConfigError, one_line, unreadable
from vdtrain.files import SHAPE_ERRORS, atomic_write, read_json

# Settings that decide which image is in which shard, and how it is stored.
PLAN_SETTINGS = ("samples_per_shard", "image_size", "encode_quality", "min_image_size", "max_aspect_ratio")


@dataclass(frozen=True)
class Part:
    """One parquet file of URLs, and the folder of its shards."""

    source: str
    number: int
    urls: Path
    folder: Path
    rows: int
    planned: int  # shards

    @classmethod
    def of(cls, source: str, urls: Path, shards: Path, samples_per_shard: int) -> Part:
        rows = pq.read_metadata(urls).num_rows
        return cls(source, int(urls.stem), urls, shards / urls.stem, rows, -(-rows // samples_per_shard))

    def beside(self, suffix: str) -> Path:
        """A file beside the folder: img2dataset reads every .json within."""
        return self.folder.with_name(self.folder.name + suffix)


class Record:
    """`NUMBER.plan.json`: the plan of a part's shards, and the outcome.

    Attributes:
        rounds: how often low shards have been retried.
        outcome: over all shards, once they are complete.
        lowest: smallest settled share of a shard (`DownloadStats.settled_share`).
    """

    def __init__(self, part: Part, config: DownloadConfig) -> None:
        """Read it, or begin it; a ConfigError if shards were made with another plan."""
        self.file = part.beside(PLAN)
        self.rounds = 0
        self.outcome: DownloadStats | None = None
        self.lowest = 1.0
        # img2dataset numbers shards by row: a changed plan would mix two sets under the same numbers.
        self.plan: dict[str, Any] = {setting: getattr(config, setting) for setting in PLAN_SETTINGS}
        self.plan["selected"] = footer_hash(part.urls)
        begun = shards.begun(part.folder)
        if not self.file.exists():
            # An interrupted download has its plan: what is unfinished without one is no leftover to clear away.
            if begun or any(part.folder.glob("*.tar")):
                raise ConfigError(
                    f"data.sources.{part.source}.shards: {part.folder} has shards without {self.file.name}, which this "
                    "download did not make; give another folder"
                )
            self._write()
            return
        try:
            earlier = read_json(self.file)
            rounds, lowest = int(earlier["rounds"]), float(earlier["lowest"])
            outcome = earlier["outcome"] and DownloadStats.load(earlier["outcome"])
            changed = [
                f"data.sources.{part.source}.selected" if key == "selected" else f"data.download.{key}"
                for key in self.plan
                if self.plan[key] != earlier["plan"].get(key)
            ]
        except OSError as error:
            raise ConfigError(f"{self.file}: {unreadable(error, self.file, 'see that it can be read')}") from error
        except SHAPE_ERRORS as error:
            raise ConfigError(
                f"{self.file}: is damaged ({one_line(error)}); remove it and {part.folder} to download anew"
            ) from error
        if changed and begun:
            raise ConfigError(
                f"{', '.join(changed)}: changed since the shards in {part.folder} were made; change it back, or remove "
                "that folder to download anew"
            )
        if changed:
            self._write()
            return
        self.rounds = rounds
        if outcome and len(shards.finished(part.folder)) == part.planned:
            self.outcome, self.lowest = outcome, lowest

    def another_round(self) -> None:
        """Record that low shards are retried."""
        self.rounds += 1
        self.outcome = None
        self._write()

    def finish(self, tallies: Collection[DownloadStats]) -> None:
        """Record the outcome of the part's shards."""
        self.outcome = sum(tallies, DownloadStats())
        self.lowest = min([self.lowest, *(each.settled_share for each in tallies)])
        self._write()

    def is_low(self, settled_share: float, config: DownloadConfig) -> bool:
        """Whether a shard should be retried."""
        return settled_share < config.retry_below and self.rounds < config.retry_rounds

    def _write(self) -> None:
        document = {
            "plan": self.plan,
            "rounds": self.rounds,
            "outcome": self.outcome and self.outcome.dump(),
            "lowest": self.lowest,
        }
        with atomic_write(self.file) as draft:
            draft.write_text(json.dumps(document, indent=1), encoding="utf-8")
