"""The scan of one metadata file: the rows that pass the filters go to scratch, as the parts will hold them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.select.block_lists import BlockLists
from data_pipeline.select.filters import FilterResult, RowFilter
from data_pipeline.select.scratch import ADDRESS, Scratch
from data_pipeline.select.sources import CAPTION, URL, Column, MetadataFile, Schema, read_columns
from vdtrain.config.data_schema import FilterConfig
from vdtrain.data.manifest import pair_uid
from vdtrain.files import written_whole


@dataclass(frozen=True)
class Scan:
    """The task of filtering a metadata file.

    Attributes:
        columns: of the parts, besides uid, url and caption.
    """

    file: MetadataFile
    schema: Schema
    columns: tuple[Column, ...]
    filters: FilterConfig
    allow_loopback: bool
    scratch: Scratch
    batch_rows: int


@dataclass
class RowCounts:
    """Rows that were read, that passed, that were dropped by reason, and that lacked a value by filter."""

    read: int = 0
    passed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)

    def add(self, other: RowCounts) -> None:
        self.read += other.read
        self.passed += other.passed
        self.dropped += other.dropped
        self.unscored += other.unscored


def scan(task: Scan) -> RowCounts:
    """Filter a metadata file and write the rows that pass.

    Raises:
        ConfigError: the file cannot be read, or scratch cannot be written.
    """
    keep = RowFilter(task.schema, task.filters, task.allow_loopback, BlockLists.load(task.scratch.block_lists))
    wanted = keep.columns()
    schema = pa.schema(
        [(name, pa.string()) for name in ("uid", URL, CAPTION)]
        + [(each.name, each.type) for each in task.columns]
        + [(ADDRESS, pa.string())]
    )
    counts = RowCounts()
    with (
        written_whole(task.scratch.rows(task.file.number), task.scratch.setting) as draft,
        pq.ParquetWriter(draft, schema, compression="zstd", compression_level=1, use_dictionary=False) as writer,
    ):
        for batch in task.file.batches(task.batch_rows):
            result = keep(read_columns(batch, task.file.columns, wanted))
            counts.add(RowCounts(len(batch), len(result.rows), result.dropped, result.unscored))
            if len(result.rows):
                writer.write_table(_pairs(task, batch, result, schema))
    pa.default_memory_pool().release_unused()  # which this process would keep while duplicates are found
    return counts


def _pairs(task: Scan, batch: pa.RecordBatch, result: FilterResult, schema: pa.Schema) -> pa.Table:
    """The rows of a batch that pass, in the columns of the parts and that of the addresses."""
    read = read_columns(batch.take(pa.array(result.rows)), task.file.columns, task.columns)
    names = zip(read[URL].to_pylist(), result.captions.to_pylist(), strict=True)
    uids = pa.array([pair_uid(task.file.source, url, caption) for url, caption in names], pa.string())
    changed = pc.if_else(pc.equal(result.addresses, read[URL]), pa.scalar(None, pa.string()), result.addresses)
    kept = [read[each.name] for each in task.columns]
    return pa.table([uids, read[URL], result.captions, *kept, changed], schema=schema)
