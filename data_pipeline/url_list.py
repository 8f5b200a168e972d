"""Which addresses of a metadata set may be fetched, as the parquet files that img2dataset reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.sources import Columns
from data_pipeline.url_policy import url_problem
from vdtrain.compose import ConfigError
from vdtrain.data_config import DownloadConfig

# What decides which picture stands in which shard, and how it is stored.
PLAN_SETTINGS = (
    "samples_per_shard",
    "image_size",
    "encode_quality",
    "min_image_size",
    "max_aspect_ratio",
)
FOOTER_BYTES = 65_536


def write_url_list(
    folder: Path, files: Sequence[Path], columns: Columns, config: DownloadConfig, allow_loopback: bool, begun: bool
) -> int:
    """Write the rows whose URL may be fetched to `folder`, file by file. Written once and kept.

    Args:
        folder: where the list goes.
        files: parquet files of the metadata.
        begun: shards were already made from the list.

    Returns:
        The number of rows.

    Raises:
        ConfigError: shards were made from another list, or with other settings.
    """
    marker = folder / "checked.json"
    # img2dataset numbers its shards by row: another plan under the same numbers would mix two sets.
    plan = {
        "files": [[file.name, _fingerprint(file)] for file in files],
        **{setting: getattr(config, setting) for setting in PLAN_SETTINGS},
        "allow_loopback": allow_loopback,
    }
    if marker.exists():
        earlier = json.loads(marker.read_text())
        changed = [
            f"data.download.{key}" if key in PLAN_SETTINGS else "metadata"
            for key in plan
            if plan[key] != earlier["plan"][key]
        ]
        if not changed:
            return int(earlier["rows"])
        if begun:
            raise ConfigError(
                f"{', '.join(changed)}: changed since shards were made; change it back, or remove the shards beside "
                f"{folder} to download anew"
            )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = [columns.url, columns.caption, *columns.kept]
    refused: Counter[str] = Counter()
    rows = 0
    for number, file in enumerate(files):
        with pq.ParquetFile(file) as parquet:
            schema = pa.schema([parquet.schema_arrow.field(column) for column in wanted])
            with pq.ParquetWriter(folder / f"{number:05d}.parquet", schema) as writer:
                for batch in parquet.iter_batches(columns=wanted):
                    problems = [url_problem(url, allow_loopback) for url in batch.column(columns.url).to_pylist()]
                    refused.update(problem for problem in problems if problem)
                    kept = batch.filter(pa.array([problem is None for problem in problems]))
                    writer.write_batch(kept.select(wanted))
                    rows += len(kept)
    draft = marker.with_suffix(".tmp")
    draft.write_text(json.dumps({"plan": plan, "rows": rows, "refused": refused}))
    os.replace(draft, marker)
    if refused:
        print(f"{folder}: refused {dict(refused)}")
    return rows


def _fingerprint(file: Path) -> str:
    """Hash of a parquet file's ending, which describes every column of it, and of its size."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - FOOTER_BYTES))
        return hashlib.sha256(opened.read() + str(size).encode()).hexdigest()
