"""A select's work on rows: the scan of a metadata file, the first of all duplicates, and the parts of kept rows.

* The scan writes the rows that pass the filters to scratch, below `data.select.scratch`. A later select uses nothing of
  it.
* DuckDB finds the rows whose address or image an earlier row has. It moves to the disk what memory cannot hold.
* The parts are files of exactly so many rows each. Processes write them at the same time.
"""

from __future__ import annotations

import glob
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.select.block_lists import BlockLists
from data_pipeline.select.filters import FilterResult, RowFilter
from data_pipeline.select.sources import CAPTION, URL, Column, MetadataFile, Schema, Source, read_columns
from data_pipeline.workers import alone
from vdtrain.config.data_schema import FilterConfig
from vdtrain.data.manifest import pair_uid
from vdtrain.errors import ConfigError, one_line
from vdtrain.files import written_whole

# Rows of a row group: fixed, so that a part's bytes do not depend on how its rows were read.
GROUP_ROWS = 1 << 16


@dataclass(frozen=True)
class Part:
    """The task of writing a part."""

    file: Path
    setting: str  # the folder's setting and its value, for errors
    scratch: Scratch
    rows: range  # places of its rows among the numbers in `scratch.kept`


def write_part(task: Part) -> None:
    """Write a part; a ConfigError if it cannot be written."""
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


FOLDER = "vdtrain_select"
# The last column of `Scratch.rows`, which the parts do not have.
ADDRESS = "address"


@dataclass(frozen=True)
class Scratch:
    """The names of the scratch files. `given` is the setting's value."""

    given: str

    @property
    def setting(self) -> str:
        """The setting and its value, for errors."""
        return f"data.select.scratch={self.given}"

    @property
    def lock(self) -> Path:
        return Path(f"{Path(self.given)}.lock")

    @property
    def folder(self) -> Path:
        """A folder below the given one, which can hold files of others."""
        return Path(self.given) / FOLDER

    @property
    def block_lists(self) -> Path:
        return self.folder / "block_lists"

    @property
    def kept(self) -> Path:
        """The numbers of the rows that the parts will hold: int64, ascending, without a header."""
        return self.folder / "kept.int64"

    def rows(self, file: int) -> Path:
        """The rows of a metadata file that pass the filters, with their addresses where the URL is another text."""
        return self.folder / f"rows-{file:06d}.parquet"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the folder for the block, and empty it before and after; a ConfigError if another select runs."""
        with alone("select", self.lock, self.setting):
            self._remove()
            try:
                yield
            finally:
                self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            Path(self.given).rmdir()


@dataclass(frozen=True)
class Scan:
    """The task of filtering a metadata file."""

    file: MetadataFile
    schema: Schema
    columns: tuple[Column, ...]  # of the parts, besides uid, url and caption
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
    """Filter a metadata file, write the rows that pass; a ConfigError if it cannot be read, or scratch not written."""
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


FILE_BITS = 40
MEGABYTES_PER_PROCESS = 300
BATCH_ROWS = 1 << 17

# Hashes of 64 bits tell URLs and images apart, in a tenth of their memory.
ROWS = f"""
SELECT ((file_index::BIGINT + {{first}}) << {FILE_BITS}) + file_row_number AS row,
  hash(coalesce({ADDRESS}, url)) AS url, {{image}} AS image
FROM read_parquet(?, file_row_number = true)"""
IMAGE = "CASE WHEN {0} <> '' THEN hash(lower({0})) END"
BY_URL = {
    "keep": "SELECT row, image FROM ({})",
    "drop": "SELECT min(row) AS row, arg_min_null(image, row) AS image FROM ({}) GROUP BY url",
}
BY_IMAGE = {
    "keep": "SELECT row FROM by_url",
    "drop": """
SELECT row FROM by_url WHERE image IS NULL
UNION ALL SELECT min(row) AS row FROM by_url WHERE image IS NOT NULL GROUP BY image""",
}


def find_first_rows(
    scratch: Scratch, sources: Sequence[Source], filters: FilterConfig, processes: int
) -> dict[str, tuple[int, int]]:
    """Find the first row of every URL, and of every image among those, and write their numbers to `scratch.kept`.

    Returns:
        By source: its rows without repeated URLs, and its rows without repeated images among those.

    Raises:
        ConfigError: DuckDB cannot write to scratch, or needs more memory.
    """
    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": processes,
        "memory_limit": f"{MEGABYTES_PER_PROCESS * processes}MB",
        "temp_directory": str(scratch.folder),
        "preserve_insertion_order": False,
    }
    rows = " UNION ALL ".join(
        ROWS.format(
            first=source.files[0].number, image=IMAGE.format(source.image_hash) if source.image_hash else "NULL"
        )
        for source in sources
    )
    paths = [[glob.escape(str(scratch.rows(file.number))) for file in source.files] for source in sources]
    try:
        with duckdb.connect(config=settings) as database:
            database.execute(f"CREATE TABLE by_url AS {BY_URL[filters.duplicate_urls].format(rows)}", paths)
            database.execute(f"CREATE TABLE by_image AS {BY_IMAGE[filters.duplicate_images]}")
            with scratch.kept.open("wb") as file:
                for batch in database.sql("SELECT row FROM by_image ORDER BY row").to_arrow_reader(BATCH_ROWS):
                    file.write(batch.column(0).to_numpy())
            by_url, by_image = (_counts(database, table, sources) for table in ("by_url", "by_image"))
    except duckdb.Error as error:
        raise ConfigError(
            f"{scratch.setting}: DuckDB cannot find the duplicates there ({one_line(error)}); make room, give "
            f"another folder, or raise data.select.processes={processes}: each adds {MEGABYTES_PER_PROCESS} MB"
        ) from error
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from error  # Ctrl-C
    return {source.name: (urls, images) for source, urls, images in zip(sources, by_url, by_image, strict=True)}


def _counts(database: duckdb.DuckDBPyConnection, table: str, sources: Sequence[Source]) -> list[int]:
    """The rows of each source in a table."""
    files = dict(database.sql(f"SELECT row >> {FILE_BITS}, count(*) FROM {table} GROUP BY ALL").fetchall())
    return [sum(files.get(file.number, 0) for file in source.files) for source in sources]
