"""Metadata in units of some row groups each, which processes filter one by one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.select.duplicates import BlockLists, hash_values, write_hashes
from data_pipeline.select.filters import RowFilter
from data_pipeline.select.selection import SELECTION_FILE, fingerprint, write_json
from data_pipeline.select.sources import URL, FileColumns, Schema, read_columns
from vdtrain.config.compose import ConfigError
from vdtrain.config.data_schema import DataConfig, FilterConfig
from vdtrain.errors import one_line, system_error, unreadable
from vdtrain.files import INCOMPLETE, LockedError, written_whole
from vdtrain.files import locked as file_locked

PLAN_FILE = "plan.json"


def prepare(
    data: DataConfig, planned: Mapping[str, Mapping[str, Any]], wanted: Sequence[str], scratch: Path, unit_rows: int
) -> None:
    """Take up the run that was interrupted, if it was of the same plan, or clear the way for a new one.

    Args:
        planned: the plans of all sources.
        wanted: the sources whose rows have to be selected.

    Raises:
        ConfigError: a source's folder holds what select did not write.
    """
    record = scratch / PLAN_FILE
    folders = {name: Path(data.sources[name].selected).resolve() for name in wanted}
    plan = {"plans": {name: fingerprint(each) for name, each in planned.items()}, "unit_rows": unit_rows}
    earlier: dict[str, Any] = {"plan": {}, "folders": [], "cleared": False}
    if record.exists():
        # A damaged one is none.
        with suppress(ValueError):
            earlier = json.loads(record.read_text(encoding="utf-8"))
    begun = {str(folder) for folder in folders.values()}
    if earlier["plan"] == plan and earlier["cleared"] and begun <= {*earlier["folders"]}:
        return
    for name, folder in folders.items():
        ours = (folder / SELECTION_FILE).exists() or str(folder) in earlier["folders"]
        if not ours and any(folder.glob("*.parquet")):
            raise ConfigError(
                f"data.sources.{name}.selected={data.sources[name].selected}: holds parquet files that select did not "
                "write; remove them, or give another folder"
            )
    # Said before anything is removed: a part without its record is known then for what it is.
    scratch.mkdir(parents=True, exist_ok=True)
    known = sorted({*earlier["folders"], *begun})
    write_json(record, {"plan": plan, "folders": known, "cleared": False})
    clear(scratch, record)
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SELECTION_FILE).unlink(missing_ok=True)
        for file in [*folder.glob("*.parquet"), *folder.glob(f"*{INCOMPLETE}")]:
            file.unlink()
    write_json(record, {"plan": plan, "folders": sorted(begun), "cleared": True})


def clear(scratch: Path, record: Path | None = None) -> None:
    """Remove what select wrote there, the plan first: units without it are not taken for whole."""
    if record is None:
        (scratch / PLAN_FILE).unlink(missing_ok=True)
    for folder in ("units", "block_lists"):
        shutil.rmtree(scratch / folder, ignore_errors=True)
    for file in scratch.glob("*.npy"):
        file.unlink()
    with suppress(OSError):
        scratch.rmdir()


@contextmanager
def locked(scratch: Path) -> Iterator[Path]:
    """Keep another run out, whose processes can live a moment longer than itself.

    Returns:
        The file that processes hold locked with this one, for `workers`.
    """
    try:
        path = scratch.with_name(scratch.name + ".lock")
        with file_locked(path, 10.0):
            yield path
    except LockedError as error:
        raise ConfigError(
            f"data.select.scratch={scratch}: another select is at work there; wait for it or stop it"
        ) from error


# Rows that a process takes at a time; what an interruption loses at most.
UNIT_ROWS = 4_000_000
BATCH_ROWS = 1 << 16
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Unit:
    """Consecutive row groups of one metadata file.

    Attributes:
        number: among the units of all sources.
        base: the number of its first row among all rows, a multiple of 8.
    """

    number: int
    base: int
    source: str
    file: Path
    columns: FileColumns
    groups: tuple[int, ...]
    rows: int

    @property
    def bytes(self) -> slice:
        """Its place among the packed bits of all rows."""
        return slice(self.base >> 3, (self.base >> 3) + -(-self.rows // 8))

    def folder(self, scratch: Path) -> Path:
        """Where its scan is written."""
        return scratch / "units" / f"{self.number:06d}"

    def batches(self, names: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Its rows in their order."""
        try:
            # Without a buffer size a whole column of a row group is held, and a row group can be a whole file.
            with pq.ParquetFile(self.file, buffer_size=READ_BYTES, pre_buffer=False) as parquet:
                columns = list(dict.fromkeys(names))
                yield from parquet.iter_batches(batch_rows, list(self.groups), columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            place, found = f"data.sources.{self.source}.metadata: {self.file}", system_error(error)
            if found is not None and found.errno is not None:
                raise ConfigError(f"{place} {unreadable(found, self.file, 'fetch it again')}") from error
            raise ConfigError(f"{place} cannot be read ({one_line(error)}); fetch it again") from error


@dataclass(frozen=True)
class Scan:
    """The task of filtering a unit."""

    unit: Unit
    schema: Schema
    filters: FilterConfig
    allow_loopback: bool
    scratch: Path
    bits: int
    batch_rows: int


def units_of(source: str, file: Path, columns: FileColumns, number: int, base: int, unit_rows: int) -> list[Unit]:
    """Cut a file between its row groups.

    Args:
        number, base: of the first unit.
    """
    with pq.ParquetFile(file) as parquet:
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    units: list[Unit] = []
    groups: list[int] = []
    for group in range(len(sizes)):
        groups.append(group)
        rows = sum(sizes[each] for each in groups)
        following = sizes[group + 1] if group + 1 < len(sizes) else unit_rows
        if rows + following > unit_rows or group + 1 == len(sizes):
            units.append(Unit(number + len(units), base, source, file, columns, tuple(groups), rows))
            base += -(-rows // 8) * 8
            groups = []
    return units


def scan(task: Scan) -> Path:
    """Filter a unit and write which rows are kept (but for duplicates), their hashes, and the counts.

    Returns:
        The unit's folder.
    """
    unit, folder = task.unit, task.unit.folder(task.scratch)
    if folder.exists():
        return folder
    keep = RowFilter(task.schema, task.filters, task.allow_loopback, BlockLists.load(task.scratch / "block_lists"))
    wanted = keep.columns()
    read = [unit.columns.url, unit.columns.caption]
    read += [unit.columns.kept[column.name] for column in wanted if column.name in unit.columns.kept]
    phash = next(iter(task.schema.roles.get("phash", ())), None)
    hashes: dict[str, list[np.ndarray]] = {"url": [], "phash": []}
    rows: dict[str, list[np.ndarray]] = {"url": [], "phash": []}
    dropped: dict[str, int] = {}
    unscored: dict[str, int] = {}
    start = 0
    for batch in unit.batches(read, task.batch_rows):
        columns = read_columns(batch, unit.columns, wanted)
        verdict = keep(columns)
        for counts, found in ((dropped, verdict.dropped), (unscored, verdict.unscored)):
            for name, count in found.items():
                counts[name] = counts.get(name, 0) + count
        rows["url"].append(verdict.rows + start)
        hashes["url"].append(hash_values(columns[URL].take(pa.array(verdict.rows))))
        if phash is not None:
            values = pc.utf8_lower(columns[phash].take(pa.array(verdict.rows)))
            present = pc.fill_null(pc.not_equal(values, ""), False)
            rows["phash"].append(verdict.rows[present.to_numpy(zero_copy_only=False)] + start)
            hashes["phash"].append(hash_values(values.filter(present)))
        start += len(batch)
    kept = np.zeros(unit.rows, bool)
    with written_whole(folder, f"data.select.scratch={task.scratch}") as draft:
        draft.mkdir(parents=True)
        for kind in hashes:
            places = np.concatenate([np.empty(0, np.int64), *rows[kind]])
            if kind == "url":
                kept[places] = True
            write_hashes(draft, kind, np.concatenate([np.empty(0, np.uint64), *hashes[kind]]), places, task.bits)
        np.save(draft / "kept.npy", np.packbits(kept, bitorder="little"))
        (draft / "counts.json").write_text(json.dumps({"dropped": dropped, "unscored": unscored}), encoding="utf-8")
    return folder
