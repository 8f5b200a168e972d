"""Shards that are made anew, touched, copied or replaced after the index, and more ranks than shards."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from data_pipeline.index.index import index
from tests.pairs import write_pairs, write_shard
from vdtrain.data.batch import Batch
from vdtrain.data.manifest import Manifest
from vdtrain.data.shards import ShardReader
from vdtrain.data.stream import PairStream, StreamError

ANEW = "made anew since the index.*; index the shards again"


def stream_of(manifest: Path, **settings: Any) -> PairStream:
    return PairStream(manifest, **{"seed": 0, "resolution": 32, "global_batch_size": 10, **settings})


def read(manifest: Path, batches: int = 4, **settings: Any) -> list[Batch]:
    stream = stream_of(manifest, **settings)
    try:
        return list(islice(stream, batches))
    finally:
        stream.close()


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(one.samples["image"], other.samples["image"]) and one.samples["text"] == other.samples["text"]
        for one, other in zip(first, second, strict=True)
    )


def turn_round(tar: Path, keep_time: bool = False) -> None:
    """Write a shard in place with its samples in the opposite order: its size stays."""
    status = tar.stat()
    with tarfile.open(tar) as old:
        members = [(member, old.extractfile(member).read()) for member in old]  # type: ignore[union-attr]
    triples = [members[first : first + 3] for first in range(0, len(members), 3)]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for member, data in [each for triple in reversed(triples) for each in triple]:
            new.addfile(member, io.BytesIO(data))
    with tar.open("r+b") as file:
        file.write(content.getvalue().ljust(status.st_size, b"\0"))
    assert tar.stat().st_size == status.st_size
    if keep_time:
        os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))


def shard(manifest: Path) -> Path:
    return Path(Manifest(manifest).shards[0])


@pytest.mark.parametrize("kind", ["other size", "cut short", "equal size", "equal size and time"])
def test_no_sample_of_a_shard_that_was_made_anew_is_used(tmp_path: Path, kind: str) -> None:
    manifest = write_pairs(tmp_path, shards=1, count=40)
    tar = shard(manifest)
    if kind == "other size":
        write_shard(tar, 40, seed=9)
    elif kind == "cut short":
        os.truncate(tar, tar.stat().st_size - 1)
    else:
        turn_round(tar, keep_time=kind == "equal size and time")
    with pytest.raises(StreamError, match=rf"{tar}: {ANEW}"):
        read(manifest, 1)
    index({"drawn": tmp_path / "shards"}, manifest)
    if kind in ("equal size", "other size"):
        assert len(read(manifest)) == 4


@pytest.mark.parametrize("kind", ["touched", "copied"])
def test_equal_shards_with_other_times_are_trained_on_with_one_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    manifest = write_pairs(tmp_path, shards=3, count=12)
    before, settings = read(manifest), {}
    if kind == "touched":
        for tar in map(Path, Manifest(manifest).shards):
            tar.touch()
    else:
        for tar in map(Path, Manifest(manifest).shards):
            (tmp_path / "disk" / "shards").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tar, tmp_path / "disk" / "shards" / tar.name)
            tar.unlink()
        settings = {"shard_root": f"file://{tmp_path}/disk/manifest"}
    capfd.readouterr()
    assert same(read(manifest, workers=4, **settings), before)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: data.manifest={manifest}: shards have other times than in the index; each is ")


def test_a_shard_is_replaced_while_a_stream_has_it_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The open file has the bytes of the index; the new one is refused once it is opened."""
    manifest = write_pairs(tmp_path, shards=2, count=40)
    expected = read(manifest, 8)
    stream = stream_of(manifest, prefetch=0)
    batches = iter(stream)
    found = [next(batches)]
    for tar in map(Path, Manifest(manifest).shards):
        shutil.copyfile(tar, tar.with_suffix(".new"))
        turn_round(tar.with_suffix(".new"))
        tar.with_suffix(".new").rename(tar)
    found += islice(batches, 3)
    assert same(found, expected[:4])
    monkeypatch.setattr(stream.reader._open, "limit", 0)
    with pytest.raises(StreamError, match=ANEW):
        list(islice(batches, 4))
    stream.close()


def test_a_shard_is_written_in_place_while_a_stream_has_it_open(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path, shards=1, count=40)
    stream = stream_of(manifest, prefetch=0)
    batches = iter(stream)
    next(batches)
    turn_round(shard(manifest))
    with pytest.raises(StreamError, match=ANEW):
        next(batches)
    stream.close()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_stand_in_other_headers(tmp_path: Path, form: int) -> None:
    (tmp_path / "shards").mkdir()
    image = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 10, 10)).save(image, "JPEG")
    members = {"jpg": image.getvalue(), "txt": b"red", "json": b'{"url": "http://127.0.0.1/red"}'}
    with tarfile.open(tmp_path / "shards" / "000000.tar", "w", format=form) as tar:
        for key in ("k" * 150, "größe-猫", "k" * 97, "k" * 96):
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "shards" / "000000_stats.json").write_text('{"status_dict": {"success": 4}}')
    index({"red": tmp_path / "shards"}, tmp_path / "manifest")
    stream = stream_of(tmp_path / "manifest", global_batch_size=4)
    assert len(stream) == 4
    next(iter(stream))
    stream.close()
    assert not stream.reader._proven


def test_a_checksum_outweighs_a_header_that_looks_wrong(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path, shards=1, count=5)
    reader = ShardReader(Manifest(manifest))
    rows = reader.manifest.rows(0)
    expected = [bytes(reader.image(0, rows, row)) for row in range(5)]
    rows = type(rows)(**{**vars(rows), "keys": pa.array(["another"] * 5)})
    assert [bytes(reader.image(0, rows, row)) for row in range(5)] == expected
    assert reader._proven == {0}
    reader.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_sixteen_ranks_read_two_shards(tmp_path: Path, workers: int) -> None:
    """Every sample comes exactly once per epoch, with its own caption."""
    (tmp_path / "shards").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "shards" / f"{number:06d}.tar", "w") as tar:
            for sample in range(number * 40, number * 40 + 40):
                image = io.BytesIO()
                Image.new("RGB", (32, 32), (3 * sample, 0, 0)).save(image, "PNG")
                described = f'{{"url": "http://127.0.0.1/{sample}"}}'.encode()
                for suffix, data in {"jpg": image.getvalue(), "txt": str(sample).encode(), "json": described}.items():
                    member = tarfile.TarInfo(f"{sample:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (tmp_path / "shards" / f"{number:06d}_stats.json").write_text('{"status_dict": {"success": 40}}')
    index({"numbered": tmp_path / "shards"}, tmp_path / "manifest")
    settings = {"world_size": 16, "global_batch_size": 80, "workers": workers, "prefetch": 1}
    streams = [stream_of(tmp_path / "manifest", rank=rank, **settings) for rank in range(16)]
    try:
        for epoch in zip(*(islice(stream, 3) for stream in streams), strict=True):
            captions = [int(caption) for batch in epoch for caption in batch.samples["text"]]
            assert sorted(captions) == list(range(80))
            colours = torch.cat([batch.samples["image"][:, 0, 0, 0] for batch in epoch])
            assert (colours.numpy() == 3 * np.array(captions)).all()
    finally:
        for stream in streams:
            stream.close()


def test_a_look_tells_what_a_run_would_meet(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path, shards=3, count=40)
    first, second, third = map(Path, Manifest(manifest).shards)
    second.touch()
    turn_round(third)
    reader = ShardReader(Manifest(manifest))
    assert (reader.look(0), reader.look(1)) == (True, False)
    with pytest.raises(StreamError, match=rf"{third}: {ANEW}"):
        reader.look(2)
    first.unlink()
    with pytest.raises(StreamError, match=rf"{first}: is not there; bring it back"):
        reader.look(0)
    reader.close()
