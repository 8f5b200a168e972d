"""Rows whose address or image an earlier row has. DuckDB finds them, and moves to the disk what does not fit in memory.

A row's number holds that of its metadata file above its place among the rows of that file that pass the filters.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence

import duckdb

from data_pipeline.select.scratch import ADDRESS, Scratch
from data_pipeline.select.sources import Source
from vdtrain.config.data_schema import FilterConfig
from vdtrain.errors import ConfigError, one_line

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
