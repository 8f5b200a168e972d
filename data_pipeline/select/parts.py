"""The rows that were kept, as parts of exactly so many pairs each, which processes write beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.select.filters import clean_captions
from data_pipeline.select.selection import part_file
from data_pipeline.select.sources import CAPTION, URL, Column, read_columns
from data_pipeline.select.units import Unit
from vdtrain.data.manifest import pair_uid
from vdtrain.files import written_whole

# Rows of a row group: fixed, so that a part's bytes do not depend on how its rows were read.
GROUP_ROWS = 1 << 16


@dataclass(frozen=True)
class Parts:
    """The task of writing the parts that begin in a unit.

    Attributes:
        units: that unit and those that follow it in its source.
        columns: of the parts, beside uid, url and caption.
        setting: the folder's, for errors.
        first, count: numbers of the parts.
        skip: kept rows of the first unit that belong to earlier parts.
        kept: file of one bit per row of all sources, packed.
    """

    units: tuple[Unit, ...]
    columns: tuple[Column, ...]
    folder: Path
    setting: str
    first: int
    count: int
    skip: int
    rows_per_part: int
    kept: Path
    batch_rows: int


def plan_parts(kept_rows: Sequence[int], rows_per_part: int) -> list[tuple[int, int, int, int]]:
    """Which parts begin in which unit of a source.

    Args:
        kept_rows: rows that are kept of each unit.

    Returns:
        For each unit in which a part begins: its place, the number of the first such part, how many there are, and how
        many kept rows stand before the first.
    """
    found = []
    before = 0
    for place, rows in enumerate(kept_rows):
        first, end = -(-before // rows_per_part), -(-(before + rows) // rows_per_part)
        if end > first:
            found.append((place, first, end - first, first * rows_per_part - before))
        before += rows
    return found


def write_parts(task: Parts) -> None:
    """Write the parts that are not there yet; the last part of a source holds what there is."""
    numbers = range(task.first, task.first + task.count)
    # What stands under its final name was renamed from a finished draft of the same plan.
    missing = [number for number in numbers if not part_file(task.folder, number).exists()]
    if not missing:
        return
    schema = _schema(task.columns)
    rows = _Rows(_kept_pairs(task, schema))
    for number in numbers:
        groups = rows.take(task.rows_per_part)
        if number not in missing:
            for _ in groups:
                pass
            continue
        with (
            written_whole(part_file(task.folder, number), task.setting) as draft,
            pq.ParquetWriter(draft, schema, compression="zstd", compression_level=1) as writer,
        ):
            for group in groups:
                writer.write_table(group, row_group_size=GROUP_ROWS)


class _Rows:
    """Tables, cut anew."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._rest: pa.Table | None = None

    def take(self, rows: int) -> Iterator[pa.Table]:
        """The next `rows` rows in tables of `GROUP_ROWS`, or fewer rows at the end."""
        while rows > 0:
            gathered: list[pa.Table] = []
            wanted = min(rows, GROUP_ROWS)
            while wanted > 0:
                if not self._rest:
                    self._rest = next(self._tables, None)
                    if self._rest is None:
                        break
                piece = self._rest.slice(0, wanted)
                self._rest = self._rest.slice(len(piece))
                gathered.append(piece)
                wanted -= len(piece)
            if not gathered:
                return
            group = pa.concat_tables(gathered).combine_chunks()
            rows -= len(group)
            yield group


def _kept_pairs(task: Parts, schema: pa.Schema) -> Iterator[pa.Table]:
    kept = np.load(task.kept, mmap_mode="r")
    skip = task.skip
    for unit in task.units:
        mask = np.unpackbits(kept[unit.bytes], count=unit.rows, bitorder="little")
        if not mask.any():
            continue
        row = 0
        for batch in unit.batches(unit.columns.names(), task.batch_rows):
            places = np.flatnonzero(mask[row : row + len(batch)])
            row += len(batch)
            passed = min(skip, len(places))
            skip -= passed
            if passed < len(places):
                yield _pairs(unit, batch.take(pa.array(places[passed:])), task.columns, schema)


def _pairs(unit: Unit, batch: pa.RecordBatch, columns: Sequence[Column], schema: pa.Schema) -> pa.Table:
    read = read_columns(batch, unit.columns, columns)
    urls, captions = read[URL], clean_captions(read[CAPTION])
    uids = [
        pair_uid(unit.source, url, caption) for url, caption in zip(urls.to_pylist(), captions.to_pylist(), strict=True)
    ]
    arrays = [pa.array(uids, pa.string()), urls, captions, *(read[column.name] for column in columns)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _schema(columns: Sequence[Column]) -> pa.Schema:
    strings = [pa.field(name, pa.string()) for name in ("uid", URL, CAPTION)]
    return pa.schema([*strings, *(pa.field(column.name, column.type) for column in columns)])
