"""A small indexed image set, written as tar shards directly, for tests that train."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import webdataset
from PIL import Image

from data_pipeline.index.index import index
from miniature.shapes import caption, draw, sample_scene
from vdtrain.data.manifest import SAMPLE_SCHEMA, Manifest


def write_shard(path: Path, count: int, seed: int, pixels: int = 64) -> None:
    """A finished tar shard as img2dataset leaves it."""
    generator = np.random.default_rng(seed)
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(count):
            scene = sample_scene(generator)
            image = io.BytesIO()
            Image.fromarray(draw(scene, pixels)).save(image, "JPEG", quality=95)
            text = caption(scene, generator)
            described = {"url": f"http://127.0.0.1/{path.stem}/{number}", "caption": text, "exif": "{}"}
            sample = {"jpg": image.getvalue(), "txt": text.encode(), "json": json.dumps(described).encode()}
            writer.write({"__key__": f"{number:06d}", **sample})
    path.with_name(path.stem + "_stats.json").write_text(json.dumps({"status_dict": {"success": count}}))


def overwrite(path: Path, offset: int, size: int) -> None:
    """Zeros in a file as a failing disk leaves them: its size and its time stay."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def write_pairs(folder: Path, shards: int = 2, count: int = 40) -> Path:
    """Write shards and their manifest; returns the manifest's path."""
    (folder / "shards").mkdir(parents=True)
    for number in range(shards):
        write_shard(folder / "shards" / f"{number:06d}.tar", count, seed=number)
    index({"drawn": folder / "shards"}, folder / "manifest")
    return folder / "manifest"


def all_samples(manifest: Path) -> pa.Table:
    """Every sample of a manifest with all columns, shard by shard."""
    content = Manifest(manifest)
    tables = [content.columns(shard, SAMPLE_SCHEMA.names) for shard in range(len(content.paths))]
    return pa.concat_tables([SAMPLE_SCHEMA.empty_table(), *tables])
