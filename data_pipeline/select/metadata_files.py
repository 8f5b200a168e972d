"""The files of a metadata set or of a block list: one file, or what lies below a folder. Links are followed, once."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import unquote

from data_pipeline.index.find import files_below
from vdtrain.errors import ConfigError, unreadable

PARQUET = (".parquet", ".parq", ".pq")
# Tables in other formats, and parquet files that are packed or not yet whole.
OTHER_TABLES = re.compile(
    r"\.(csv|tsv|jsonl|ndjson|arrow|feather|ipc|orc|avro|xlsx?)(\.(gz|bz2|xz|zst|zip|lz4))?$|\.parquet\.(?!crc$)",
    re.IGNORECASE,
)
CONVERT = "convert it to parquet, e.g. in DuckDB by COPY (FROM 'a.csv.gz') TO 'a.parquet'"
SHOWN = 3
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def _files_below(place: str, folder: Path, left_out: Collection[Path] = ()) -> list[Path]:
    """All files below a folder, by name.

    Hidden files and folders are passed over, and so are folders in which other programs keep their own files
    (`_temporary`).

    Args:
        place: the setting and its value, for errors.
        left_out: folders, without links in their paths, that are passed over.

    Raises:
        ConfigError: a folder cannot be read, a link leads nowhere, or the folder is a Delta table.
    """
    found: dict[tuple[str, ...], Path] = {}
    try:
        for path in files_below(folder, {*map(str, left_out)} - {str(folder.resolve())}):
            *folders, name = parts = path.relative_to(folder).parts
            if "_delta_log" in folders:
                raise ConfigError(f"a Delta table, whose log says which rows are deleted; export {folder} as parquet")
            if name.startswith(".") or any(each[0] in "._" and "=" not in each for each in folders):
                continue
            try:
                path.stat()
            except OSError as error:
                raise ConfigError(f"{path} {unreadable(error, path, 'give another folder')}") from error
            found[parts] = path
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    return [found[parts] for parts in sorted(found)]


def metadata_files(setting: str, metadata: str, left_out: Collection[Path] = (), announce: bool = False) -> list[Path]:
    """The parquet files of a set, by name: one file, or all files below a folder.

    Args:
        left_out: see `_files_below`.
        announce: print which tables of other formats are passed over.

    Raises:
        ConfigError: no parquet file is there, or what is there cannot be read.
    """
    path, place = Path(metadata), f"{setting}={metadata}"
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{place}: {unreadable(FileNotFoundError(2, ''), path)}")
    if not path.is_dir():
        if not path.is_file():
            raise ConfigError(f"{place}: no parquet file there; put the metadata there or give another path")
        return [path]
    below = _files_below(place, path, left_out)
    files = [file for file in below if file.name.lower().endswith(PARQUET)]
    others = [file for file in below if OTHER_TABLES.search(file.name)]
    if not files:
        there = _listed(path, others or [file for file in below if not file.name.startswith("_")])
        remedy = CONVERT if others else "put the metadata there or give another path"
        raise ConfigError(f"{place}: no parquet file there{there and f', only {there}'}; {remedy}")
    if others and announce:
        print(f"{place}: passed over {_listed(path, others)}, as only parquet is read", flush=True)
    return files


def partition(metadata: str, file: Path) -> dict[str, str | None]:
    """The values that the folders above a file give to all its rows: `lang=en/a.parquet` gives lang."""
    folders = file.relative_to(metadata).parts[:-1] if Path(metadata).is_dir() else ()
    named = [folder.partition("=") for folder in folders if "=" in folder[1:]]
    return {unquote(name): None if value == HIVE_NULL else unquote(value) for name, _, value in named}


def block_list_files(setting: str, names: Sequence[str]) -> list[Path]:
    """The files of block lists, all files below a folder; a ConfigError if it is empty or cannot be read."""
    found: list[Path] = []
    for path in map(Path, names):
        files = [path]
        if path.is_dir():
            files = [file for file in _files_below(f"{setting}: {path}", path) if not file.name.startswith("_")]
        if not files:
            raise ConfigError(f"{setting}: {path} is empty; give another folder, or leave it out")
        found += files
    return found


def _listed(folder: Path, files: Collection[Path]) -> str:
    names = [str(file.relative_to(folder)) for file in files]
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
