"""A stream over 2,000 shards stops at 90 % of its epoch and restarts. About 20 seconds."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.index.index import index
from vdtrain.data.batch import Batch
from vdtrain.data.stream import PairStream

SHARDS, SAMPLES, PIXELS = 2000, 3, 8
EPOCH = SHARDS * SAMPLES
# 90 % of the epoch; later batches reach into the next epoch.
BATCH, DONE, BATCHES = 100, 54, 8


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restart")
    (folder / "shards").mkdir()
    for shard in range(SHARDS):
        path = folder / "shards" / f"{shard:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(SAMPLES):
                _add_sample(tar, shard * SAMPLES + number)
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"status_dict": {"success": SAMPLES}}))
    index({"numbered": folder / "shards"}, folder / "manifest")
    return folder / "manifest"


def _add_sample(tar: tarfile.TarFile, number: int) -> None:
    """An image of one colour, which is the sample's number, and the number as its caption."""
    file = io.BytesIO()
    Image.new("RGB", (PIXELS, PIXELS), (8 * (number // 625), 10 * (number // 25 % 25), 10 * (number % 25))).save(
        file, "PNG"
    )
    described = {"url": f"http://127.0.0.1/{number}", "caption": str(number), "exif": "{}"}
    members = {"jpg": file.getvalue(), "txt": str(number).encode(), "json": json.dumps(described).encode()}
    for suffix, data in members.items():
        member = tarfile.TarInfo(f"{number:09d}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def read(manifest: Path, start: int, batches: int, **settings: int) -> list[Batch]:
    stream = PairStream(manifest, seed=5, resolution=PIXELS, global_batch_size=BATCH, start=start, block=64, **settings)
    assert stream.order.pools[0].lanes == 64
    try:
        return list(islice(stream, batches))
    finally:
        stream.close()


def test_a_restart_deep_in_an_epoch_goes_on_with_the_same_batches(manifest: Path) -> None:
    whole = read(manifest, 0, DONE + BATCHES)
    resumed = read(manifest, DONE * BATCH, BATCHES)
    halves = [read(manifest, DONE * BATCH, BATCHES, rank=rank, world_size=2) for rank in (0, 1)]
    for number, (expected, found) in enumerate(zip(whole[DONE:], resumed, strict=True)):
        pieces = [half[number] for half in halves]
        assert torch.equal(expected.positions, found.positions)
        assert torch.equal(expected.samples["image"], found.samples["image"])
        assert torch.equal(expected.samples["image"], torch.cat([piece.samples["image"] for piece in pieces]))
        assert (
            expected.samples["text"]
            == found.samples["text"]
            == [caption for piece in pieces for caption in piece.samples["text"]]
        )
    # Across the restart, the epoch held every sample once, each image with its own caption.
    epoch = [*whole[:DONE], *resumed[: EPOCH // BATCH - DONE]]
    assert sorted(int(caption) for batch in epoch for caption in batch.samples["text"]) == list(range(EPOCH))
    for batch in resumed:
        numbers = np.array([int(caption) for caption in batch.samples["text"]])
        colours = np.stack([8 * (numbers // 625), 10 * (numbers // 25 % 25), 10 * (numbers % 25)], axis=1)
        assert (batch.samples["image"].numpy()[:, :, 0, 0] == colours).all()
