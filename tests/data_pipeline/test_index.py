"""Shards into a manifest: damage is found wherever it is, broken samples are counted, known shards are passed over."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset

import data_pipeline.index
from data_pipeline.index import ShardError, index, read_shard
from tests.pairs import write_pairs, write_shard
from vdtrain.data.manifest import Manifest, ManifestError


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "000000.tar"
    write_shard(path, 6, seed=0)
    return path


def cuts(path: Path) -> dict[str, int]:
    """Lengths at which a tar can be cut, by where that is."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    fourth = members[3]
    return {
        "at a member's boundary": fourth.offset,
        "inside a header": fourth.offset + 100,
        "inside a payload": fourth.offset_data + 10,
        "before the end blocks": members[-1].offset_data + -(-members[-1].size // 512) * 512,
        "inside the end blocks": members[-1].offset_data + -(-members[-1].size // 512) * 512 + 512,
    }


@pytest.mark.parametrize(
    "place",
    ["at a member's boundary", "inside a header", "inside a payload", "before the end blocks", "inside the end blocks"],
)
def test_a_shard_cut_short_is_refused(shard: Path, place: str) -> None:
    data = shard.read_bytes()
    shard.write_bytes(data[: cuts(shard)[place]])
    with pytest.raises(ShardError, match=r"000000\.tar: (cut short|damaged).*download again"):
        read_shard(shard, "drawn")


def test_a_damaged_header_is_refused(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    start = cuts(shard)["at a member's boundary"]
    data[start : start + 400] = b"\xff" * 400
    shard.write_bytes(bytes(data))
    with pytest.raises(ShardError):
        read_shard(shard, "drawn")


def test_offsets_point_at_what_another_library_reads(shard: Path) -> None:
    data = shard.read_bytes()
    own = read_shard(shard, "drawn")
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert len(own.samples) == len(theirs) == 6
    for row, sample in zip(own.samples, theirs, strict=True):
        assert data[row["offset"] : row["offset"] + row["size"]] == sample["jpg"]
        assert row["caption"] == sample["txt"].decode()
        assert (row["width"], row["height"]) == (64, 64)
    assert len({row["uid"] for row in own.samples}) == 6


def test_broken_members_are_left_out_and_counted(shard: Path) -> None:
    with tarfile.open(shard) as tar:
        good = {member.name.partition(".")[2]: tar.extractfile(member).read() for member in tar.getmembers()[:3]}
    samples = {
        "whole": good,
        "no_text": {"jpg": good["jpg"], "json": good["json"]},
        "no_picture": {**good, "jpg": b"not a picture"},
        "no_words": {**good, "txt": b" "},
        "sideways": {**good, "json": json.dumps({"exif": '{"Image Orientation": "Rotated 90 CW"}'}).encode()},
        "../escape": good,
        "list": {**good, "json": b"[]"},
        "badexif": {**good, "json": json.dumps({"exif": "[]"}).encode()},
    }
    with tarfile.open(shard, "w") as tar:
        for key, members in samples.items():
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    reading = read_shard(shard, "drawn")
    assert len(reading.samples) == 1
    assert reading.broken["unsafe name"] == 3
    assert reading.broken["incomplete sample"] == 1
    assert reading.broken["empty caption"] == 1
    assert reading.broken["rotated by EXIF"] == 1
    assert sum(reading.broken.values()) == 9


def test_only_new_shards_are_read_and_the_manifest_is_the_same_as_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_pairs(tmp_path, shards=2, count=5)
    write_shard(tmp_path / "shards" / "000002.tar", 5, seed=2)
    write_shard(tmp_path / "shards" / "000003.tar", 5, seed=3)
    (tmp_path / "shards" / "000003_stats.json").unlink()
    read = []
    monkeypatch.setattr(
        data_pipeline.index, "read_shard", lambda path, source: read.append(path.name) or read_shard(path, source)
    )
    index({"drawn": tmp_path / "shards"}, manifest)
    assert read == ["000002.tar"]
    assert len(Manifest(manifest)) == 15
    index({"drawn": tmp_path / "shards"}, tmp_path / "fresh")
    for name in ("samples.parquet", "shards.parquet"):
        assert pq.read_table(manifest / name).equals(pq.read_table(tmp_path / "fresh" / name))


def test_no_shards_and_no_manifest_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="run the download first"):
        index({"drawn": tmp_path}, tmp_path / "manifest")
    with pytest.raises(ManifestError, match="data_pipeline index"):
        Manifest(tmp_path / "manifest")
