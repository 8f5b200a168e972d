"""Seconds from making a stream at 90 % of an epoch to its first batch: part of benchmarks/loader.py.

Manifests of 2,000 and 10,000 shards with 10,000 samples each, written as the indexer writes them; every shard is a link
to one tar of real images. The manifest's files are dropped from the page cache before each restart.
"""

from __future__ import annotations

import os
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from loader_images import caption, vocabulary, write_shard

from data_pipeline.index.index import index
from vdtrain.data.manifest import SAMPLE_SCHEMA, SHARD_SCHEMA, Manifest, SamplesWriter, write_shards
from vdtrain.data.stream import PairStream

SAMPLES, IMAGES, FILE_SHARDS = 10_000, 100, 2000
SETS = (2000, 10_000)
BATCH, RANKS, REPEATS = 2048, 8, 5


def write_manifests(folder: Path) -> list[Path]:
    """The manifests of all sizes; files of samples are the same in all, 2,000 shards in each."""
    (folder / "shards").mkdir(parents=True)
    write_shard(folder / "shards" / "00000.tar", IMAGES, seed=0)
    index({"photographs": folder / "shards"}, folder / "manifest")
    real = Manifest(folder / "manifest").columns(0, SAMPLE_SCHEMA.names)
    generator, words = np.random.default_rng(0), vocabulary()
    table = real.take(pa.array(np.arange(SAMPLES) % len(real)))
    own = {
        "uid": [generator.bytes(16).hex() for _ in range(SAMPLES)],
        "caption": [caption(generator, words) for _ in range(SAMPLES)],
    }
    for name, values in own.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    described = Manifest(folder / "manifest")
    shard = {
        "source": "photographs",
        "bytes": int(described.bytes[0]),
        "modified_ns": int(described.modified[0]),
        "sha256": described.hashes[0],
        "broken": "{}",
        "decoded": False,
    }
    manifests = [folder / f"manifest-{shards}" for shards in SETS]
    writer = SamplesWriter(manifests[0], "samples-00000.parquet")
    for number in range(FILE_SHARDS):
        writer.add({**shard, "path": f"../links/{number:05d}.tar"}, table.select(SAMPLE_SCHEMA.names))
    writer.close()
    (folder / "links").mkdir()
    for number in range(max(SETS)):
        (folder / "links" / f"{number:05d}.tar").symlink_to(folder / "shards" / "00000.tar")
    for manifest, shards in zip(manifests, SETS, strict=True):
        manifest.mkdir(exist_ok=True)
        rows = []
        for number in range(shards):
            file, group = divmod(number, FILE_SHARDS)
            name = f"samples-{file:05d}.parquet"
            if not (manifest / name).exists():
                os.link(writer.path, manifest / name)
            rows.append({**writer.rows[group], "path": f"../links/{number:05d}.tar", "samples_file": name})
        write_shards(manifest, pa.Table.from_pylist(rows, SHARD_SCHEMA))
    return manifests


def seconds(manifest: Path, share: float) -> tuple[float, float]:
    """Until the stream stands, and until rank 0 of 8 has its 256 images of the batch at a share of the epoch."""
    for path in manifest.glob("*.parquet"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    samples = int(Manifest(manifest).samples.sum())
    began = time.perf_counter()
    stream = PairStream(
        manifest,
        seed=0,
        resolution=256,
        global_batch_size=BATCH,
        rank=0,
        world_size=RANKS,
        start=int(samples * share) // BATCH * BATCH,
        workers=2,
    )
    stands = time.perf_counter() - began
    (batch,) = islice(stream, 1)
    delivered = time.perf_counter() - began
    if len(batch.samples["text"]) != BATCH // RANKS:
        raise SystemExit("the batch is not whole")
    stream.close()
    return stands, delivered


def restart(folder: Path) -> dict[str, Any]:
    """Medians and worst of several restarts, of each size."""
    table = []
    for manifest, shards in zip(write_manifests(folder), SETS, strict=True):
        for share in (0.1, 0.9):
            taken = [seconds(manifest, share) for _ in range(REPEATS)]
            table.append(
                {
                    "shards": shards,
                    "samples": shards * SAMPLES,
                    "at": share,
                    "stream_stands_seconds": round(statistics.median(row[0] for row in taken), 2),
                    "first_batch_seconds": round(statistics.median(row[1] for row in taken), 2),
                    "worst_first_batch_seconds": round(max(row[1] for row in taken), 2),
                }
            )
    return {"batch_of_a_rank": BATCH // RANKS, "ranks": RANKS, "repeats": REPEATS, "table": table}
