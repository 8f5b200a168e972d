"""The parts: the rows that are kept, in files of exactly so many rows each, which processes write at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.select.duplicates import FILE_BITS
from data_pipeline.select.scratch import ADDRESS, Scratch
from vdtrain.files import written_whole

# Rows of a row group: fixed, so that a part's bytes do not depend on how its rows were read.
GROUP_ROWS = 1 << 16


@dataclass(frozen=True)
class Part:
    """The task of writing a part.

    Attributes:
        setting: the folder's setting and its value, for errors.
        rows: places of its rows among the numbers in `scratch.kept`.
    """

    file: Path
    setting: str
    scratch: Scratch
    rows: range


def write_part(task: Part) -> None:
    """Write a part.

    Raises:
        ConfigError: it cannot be written.
    """
    rows = np.memmap(task.scratch.kept, np.int64, "r")[task.rows.start : task.rows.stop]
    schema = pq.read_schema(task.scratch.rows(int(rows[0]) >> FILE_BITS))
    schema = schema.remove(schema.get_field_index(ADDRESS))
    with (
        written_whole(task.file, task.setting) as draft,
        pq.ParquetWriter(draft, schema, compression="zstd", compression_level=1) as writer,
    ):
        for start in range(0, len(rows), GROUP_ROWS):
            tables = list(_read(task.scratch, rows[start : start + GROUP_ROWS], schema.names))
            writer.write_table(pa.concat_tables(tables).combine_chunks(), GROUP_ROWS)


def _read(scratch: Scratch, rows: np.ndarray, columns: list[str]) -> Iterator[pa.Table]:
    """The rows of ascending numbers."""
    for file in range(int(rows[0]) >> FILE_BITS, (int(rows[-1]) >> FILE_BITS) + 1):
        with pq.ParquetFile(scratch.rows(file)) as parquet:
            first = file << FILE_BITS
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                found = rows[slice(*np.searchsorted(rows, (first, end)))]
                if len(found):
                    table = parquet.read_row_group(group, columns, use_threads=False)
                    yield table.take(pa.array(found - first))
                first = end
