"""The record of a source's selection and of its plan: `selection.json`, which is written after all parts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.select.metadata_files import block_list_files, metadata_files
from vdtrain.config.data_schema import DataConfig
from vdtrain.config.instantiate import recorded
from vdtrain.errors import ConfigError, unreadable
from vdtrain.files import INCOMPLETE, read_json, written_whole

SELECTION_FILE = "selection.json"
# Marks a folder whose parts are being written, so that a later select may remove them.
UNFINISHED_FILE = "selection.json.unfinished"
FOOTER_BYTES = 65_536
# Increase it when the rules of a filter, of the URL policy or of the captions' cleaning change what earlier selections
# kept. Rules that read more rows than before leave a finished selection as it is.
RULES = 1


@dataclass(frozen=True)
class Selection:
    """The selection of one source."""

    fingerprint: str  # of the plan
    plan: dict[str, Any]  # by setting, everything that decides which rows are kept and in which order
    read: int  # rows of the metadata
    rows: int  # rows kept, in `parts` files of `rows_per_part` rows; the last part holds the rest
    parts: int
    rows_per_part: int
    counts: dict[str, int]  # rows dropped, counted by the first filter that rejected them
    unscored: dict[str, int]  # rows that passed a filter without the value that it reads, counted by filter

    def files(self, folder: Path) -> list[Path]:
        """The parts, in order."""
        return [part_file(folder, number) for number in range(self.parts)]

    def text(self) -> str:
        """The counts, in lines."""
        share = self.rows / self.read if self.read else 0.0
        lines = [f"{self.rows:,} of {self.read:,} rows kept ({share:.1%}), in {self.parts:,} parts"]
        lines += [f"  {count:>14,} {reason}" for reason, count in self.counts.items()]
        lines += [f"  {count:>14,} kept without a value for {name}" for name, count in self.unscored.items()]
        return "\n".join(lines)


def part_file(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"{number:05d}.parquet"


def read_selection(folder: Path) -> Selection | None:
    """The selection in a folder, None if select has not finished it; a ConfigError if it cannot be read."""
    file = folder / SELECTION_FILE
    try:
        return recorded(Selection, "selection", read_json(file))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{file}: {unreadable(error, file)}") from error
    except ValueError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error}); remove the folder {folder} and run `python -m data_pipeline select` "
            "again"
        ) from error


def begin_selections(folders: Mapping[str, Path]) -> None:
    """Remove earlier selections, by setting; a ConfigError if a folder holds parquet that select did not write."""
    for setting, folder in folders.items():
        ours = (folder / SELECTION_FILE).exists() or (folder / UNFINISHED_FILE).exists()
        if not ours and any(folder.glob("*.parquet")):
            raise ConfigError(f"{setting}: holds parquet files that select did not write; give another folder")
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED_FILE).touch()
        (folder / SELECTION_FILE).unlink(missing_ok=True)
        for file in [*folder.glob("*.parquet"), *folder.glob(f"*{INCOMPLETE}")]:
            file.unlink()


def write_selection(folder: Path, selection: Selection) -> None:
    """Write the record, once all parts are written."""
    with written_whole(folder / SELECTION_FILE, str(folder), overwrite=True) as draft:
        draft.write_text(json.dumps(asdict(selection), indent=1), encoding="utf-8")
    (folder / UNFINISHED_FILE).unlink(missing_ok=True)


def plans(data: DataConfig) -> dict[str, dict[str, Any]]:
    """For each source, everything that decides which rows are kept and in which order.

    Because of duplicates, a source's rows depend on the sources before it. They do not depend on later sources.

    Raises:
        ConfigError: metadata or a block list is missing.
    """
    settings = _flat("data.select.filters", asdict(data.select.filters))
    lists = _flat("data.select.block_lists", asdict(data.select.block_lists))
    settings |= {name: [_whole(name, file) for file in block_list_files(name, files)] for name, files in lists.items()}
    settings |= {
        "data.select.rows_per_part": data.select.rows_per_part,
        "data.allow_loopback": data.allow_loopback,
        "the rules of select": RULES,
    }
    found = {}
    for name, source in data.sources.items():
        setting = f"data.sources.{name}"
        files = metadata_files(f"{setting}.metadata", source.metadata, made_folders(data))
        settings |= {
            f"{setting}.schema": source.schema,
            f"{setting}.metadata": [_described(f"{setting}.metadata", source.metadata, file) for file in files],
        }
        if source.columns:
            settings[f"{setting}.columns"] = dict(source.columns)
        found[name] = dict(settings)
    return found


def made_folders(data: DataConfig) -> set[Path]:
    """The folders that the pipeline writes: what lies there is no metadata."""
    folders = [folder for source in data.sources.values() for folder in (source.selected, source.shards)]
    return {Path(folder).resolve() for folder in (*folders, data.select.scratch, data.manifest)}


def fingerprint(plan: Mapping[str, Any]) -> str:
    """SHA-256 of a plan."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def changed_settings(earlier: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """The settings in which two plans differ."""
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


def _described(setting: str, metadata: str, file: Path) -> list[str]:
    """A file's name in its set, and the hash of its footer."""
    try:
        return [str(file.relative_to(metadata)) if file != Path(metadata) else file.name, footer_hash(file)]
    except OSError as error:
        raise ConfigError(f"{setting}: {file} {unreadable(error, file, 'fetch it again')}") from error


def footer_hash(file: Path) -> str:
    """Hash of a parquet file's size and of its end, which describes all its columns."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - FOOTER_BYTES))
        return hashlib.sha256(opened.read() + str(size).encode()).hexdigest()
