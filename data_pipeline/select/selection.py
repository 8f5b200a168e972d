"""What select made of a source and by which plan: `selection.json`, written last beside the parts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.select.sources import metadata_files
from vdtrain.config.compose import ConfigError
from vdtrain.config.data_schema import DataConfig
from vdtrain.errors import unreadable
from vdtrain.files import INCOMPLETE, sync, write_text

SELECTION_FILE = "selection.json"
FOOTER_BYTES = 65_536
# Counts up when the rules of a filter, of the URL policy or of the captions' cleaning change.
RULES = 1


@dataclass(frozen=True)
class Selection:
    """What stands in one source's folder of selected parts.

    Attributes:
        fingerprint: of the plan.
        plan: every setting and file that decides which row stands where, by setting.
        read: rows of the metadata.
        rows: rows that were kept, in `parts` files of `rows_per_part` rows, the last of the rest.
        counts: rows that were dropped, by the first reason that met them.
        unscored: rows that were kept by a filter because they lack the value that it asks for, by filter.
    """

    fingerprint: str
    plan: dict[str, Any]
    read: int
    rows: int
    parts: int
    rows_per_part: int
    counts: dict[str, int]
    unscored: dict[str, int]

    def files(self, folder: Path) -> list[Path]:
        """The parts, in their order."""
        return [part_file(folder, number) for number in range(self.parts)]

    def text(self) -> list[str]:
        """The counts as lines."""
        share = self.rows / self.read if self.read else 0.0
        lines = [f"{self.rows:,} of {self.read:,} rows kept ({share:.1%}), in {self.parts:,} parts"]
        lines += [f"  {count:>14,} {reason}" for reason, count in self.counts.items()]
        lines += [f"  {count:>14,} kept without a value for {name}" for name, count in self.unscored.items()]
        return lines


def part_file(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"{number:05d}.parquet"


def read_selection(folder: Path) -> Selection | None:
    """What select made in a folder, or None where it has not finished.

    Raises:
        ConfigError: its record cannot be read.
    """
    file = folder / SELECTION_FILE
    try:
        return Selection(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{file}: {unreadable(error, file)}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{file}: cannot be read ({error}); remove the folder {folder} and run `python -m data_pipeline select` "
            "again"
        ) from error


def write_selection(folder: Path, selection: Selection) -> None:
    """Write the record."""
    write_json(folder / SELECTION_FILE, asdict(selection))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all."""
    draft = file.with_name(file.name + INCOMPLETE)
    write_text(draft, json.dumps(content, indent=1))
    draft.replace(file)
    sync(file.parent)


def plans(data: DataConfig) -> dict[str, dict[str, Any]]:
    """Per source, everything that decides which of its rows stand where.

    A source's rows depend on the sources before it, through duplicates, and not on those after it.

    Raises:
        ConfigError: metadata or a block list is missing.
    """
    settings = _flat("data.select.filters", asdict(data.select.filters))
    lists = _flat("data.select.block_lists", asdict(data.select.block_lists))
    settings |= {name: [_whole(name, Path(file)) for file in files] for name, files in lists.items()}
    settings |= {
        "data.select.rows_per_part": data.select.rows_per_part,
        "data.allow_loopback": data.allow_loopback,
        "the rules of select": RULES,
    }
    found = {}
    for name, source in data.sources.items():
        setting = f"data.sources.{name}"
        files = metadata_files(f"{setting}.metadata", source.metadata)
        settings |= {
            f"{setting}.schema": source.schema,
            f"{setting}.metadata": [[file.name, footer_hash(file)] for file in files],
        }
        found[name] = dict(settings)
    return found


def fingerprint(plan: Mapping[str, Any]) -> str:
    """SHA-256 of a plan."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def changed_settings(earlier: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """Settings in which two plans differ."""
    return sorted(name for name in {*earlier, *plan} if earlier.get(name) != plan.get(name))


def _flat(prefix: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(f"{prefix}.{name}", value) if isinstance(value, dict) else {f"{prefix}.{name}": value}
    return flat


def _whole(setting: str, file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{setting}: {file} {unreadable(error, file)}") from error


def footer_hash(file: Path) -> str:
    """Hash of a parquet file's ending, which describes every column of it, and of its size."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - FOOTER_BYTES))
        return hashlib.sha256(opened.read() + str(size).encode()).hexdigest()
