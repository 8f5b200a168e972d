"""The manifest: what lies where in the tar shards, one row per sample and one per shard.

A manifest is a folder with `samples.parquet` and `shards.parquet`. It is replaced as a whole, never changed in place,
and shard paths are relative to it, so that shards and manifest can move together.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

SAMPLES_FILE, SHARDS_FILE = "samples.parquet", "shards.parquet"

SAMPLE_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("uid", pa.string()),  # 128-bit hash of source, URL and caption, hexadecimal
        pa.field("shard", pa.int32()),  # row in shards.parquet
        pa.field("offset", pa.int64()),  # of the image file's bytes in the tar
        pa.field("size", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("caption", pa.string()),
    ]
)
SHARD_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("source", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("modified_ns", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("samples", pa.int32()),
        pa.field("broken", pa.string()),  # JSON: reason -> members left out
    ]
)


class ManifestError(ValueError):
    """A manifest that cannot be used; the message is one line."""


class Manifest:
    """A manifest in memory: arrays over samples, in the order of the shards.

    Attributes:
        shards: paths of the tar files.
        shard: int32 [N] index into `shards`.
        offset, size: int64 [N] place of the image bytes.
        shortest_side: int32 [N] in pixels.
        captions: pyarrow strings [N].
    """

    def __init__(self, folder: Path) -> None:
        try:
            samples = pq.read_table(folder / SAMPLES_FILE, schema=SAMPLE_SCHEMA)
            shards = pq.read_table(folder / SHARDS_FILE, schema=SHARD_SCHEMA)
        except (OSError, pa.ArrowException) as error:
            raise ManifestError(
                f"data.manifest={folder}: cannot be read ({error}); run python -m data_pipeline index"
            ) from error
        self.shards = [folder / str(path) for path in shards["path"].to_pylist() if path]
        self.shard: NDArray[np.int32] = samples["shard"].to_numpy()
        self.offset: NDArray[np.int64] = samples["offset"].to_numpy()
        self.size: NDArray[np.int64] = samples["size"].to_numpy().astype(np.int64)
        self.shortest_side: NDArray[np.int32] = np.minimum(samples["width"].to_numpy(), samples["height"].to_numpy())
        self.captions = samples["caption"].combine_chunks()

    def __len__(self) -> int:
        return len(self.shard)


def write_manifest(folder: Path, samples: pa.Table, shards: pa.Table) -> None:
    """Replace the manifest at `folder`, which is whole before and after."""
    draft = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for table, name in ((samples, SAMPLES_FILE), (shards, SHARDS_FILE)):
        with (draft / name).open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
    replaced = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    draft.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
