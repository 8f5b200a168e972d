"""One shard read: damage is found wherever it is, broken samples are left out by reason, places are exact."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.index.shard_reading import ShardError, read_shard
from tests.pairs import write_shard
from vdtrain.data.manifest import pair_uid
from vdtrain.data.tar_samples import ORIENTATIONS

PLACES = (
    "at a member's boundary",
    "inside a header",
    "inside a payload",
    "before the end blocks",
    "inside the end blocks",
)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "000000.tar"
    write_shard(path, 6, seed=0)
    return path


@pytest.fixture
def good(shard: Path) -> dict[str, bytes]:
    """The members of a whole sample."""
    with tarfile.open(shard) as tar:
        return {member.name.partition(".")[2]: tar.extractfile(member).read() for member in tar.getmembers()[:3]}


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_samples(path: Path, samples: Mapping[str, Mapping[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> None:
    members = [(f"{key}.{suffix}", content) for key, sample in samples.items() for suffix, content in sample.items()]
    write_tar(path, members, format)
    path.with_name(path.stem + "_stats.json").unlink(missing_ok=True)


def cuts(path: Path) -> dict[str, int]:
    """Lengths at which a tar can be cut, by where that is."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    fourth = members[3]
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    return dict(zip(PLACES, (fourth.offset, fourth.offset + 100, fourth.offset_data + 10, end, end + 512), strict=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("downloaded", [True, False])
def test_a_shard_cut_short_is_refused_and_only_a_download_of_ours_is_done_again(
    shard: Path, place: str, downloaded: bool
) -> None:
    data = shard.read_bytes()
    shard.write_bytes(data[: cuts(shard)[place]])
    plan = shard.parent.with_name(shard.parent.name + ".plan.json")
    remedy = r"replace it by a whole copy, or name its folder by data\.shards"
    if downloaded:
        plan.touch()
        remedy = r"remove it and 000000_stats\.json, and download again"
    try:
        with pytest.raises(ShardError, match=rf"000000\.tar: cut short; {remedy}"):
            read_shard(shard, "drawn")
    finally:
        plan.unlink(missing_ok=True)


def test_a_shard_cut_at_any_block_or_byte_is_refused(tmp_path: Path, good: dict[str, bytes]) -> None:
    path = tmp_path / "small.tar"
    write_samples(path, {"one": {**good, "jpg": good["jpg"]}})
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    whole = -(-end // 512) * 512 + 1024
    for length in [*range(0, whole, 256), whole - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ShardError, match="cut short"):
            read_shard(path, "drawn")
    path.write_bytes(data[:whole])
    assert len(read_shard(path, "drawn").samples) == 1


@pytest.mark.parametrize(
    ("start", "length", "value"),
    [(0, 400, b"\xff"), (0, 1, b"\x07"), (124, 12, b"9"), (124, 12, b"\x80"), (148, 8, b"7"), (0, 512, b"\0")],
)
def test_a_damaged_header_is_refused(shard: Path, start: int, length: int, value: bytes) -> None:
    data = bytearray(shard.read_bytes())
    header = cuts(shard)["at a member's boundary"]
    data[header + start : header + start + length] = value * length
    shard.write_bytes(bytes(data))
    with pytest.raises(ShardError, match=r"damaged header|only one block|cut short"):
        read_shard(shard, "drawn")


def test_any_damage_is_refused_or_counted(shard: Path) -> None:
    generator = np.random.default_rng(0)
    whole = shard.read_bytes()
    offsets = set(read_shard(shard, "drawn").samples["offset"].to_pylist())
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for place in generator.integers(0, len(data) - 2048, 3):
            data[place] = generator.integers(0, 256)
        shard.write_bytes(data)
        try:
            reading = read_shard(shard, "drawn")
        except ShardError:
            refused += 1
            continue
        # Bytes of a caption or of an image may be others now; places are not, and none is lost uncounted.
        assert len(reading.samples) + sum(reading.broken.values()) >= 6
        assert set(reading.samples["offset"].to_pylist()) <= offsets
    assert 50 < refused < 400


def test_one_sample_at_a_time_is_in_memory(tmp_path: Path, good: dict[str, bytes]) -> None:
    path, megabyte = tmp_path / "large.tar", 1 << 20
    write_samples(path, {f"{number:03d}": {**good, "jpg": good["jpg"] + bytes(megabyte)} for number in range(30)})
    read_shard(path, "drawn")
    tracemalloc.start()
    try:
        assert len(read_shard(path, "drawn").samples) == 30
        assert tracemalloc.get_traced_memory()[1] < 6 * megabyte
    finally:
        tracemalloc.stop()


def test_members_behind_the_end_and_fewer_than_were_downloaded_are_refused(shard: Path) -> None:
    data = shard.read_bytes()
    shard.write_bytes(data + data)
    with pytest.raises(ShardError, match="data follow its end"):
        read_shard(shard, "drawn")
    # All from the second sample on is zeros, as on a disk that lost its last writes: to a tar reader it is the end.
    start = cuts(shard)["at a member's boundary"]
    shard.write_bytes(data[:start] + bytes(len(data) - start))
    with pytest.raises(ShardError, match="holds 1 samples of 6 that were downloaded"):
        read_shard(shard, "drawn")
    shard.with_name("000000_stats.json").write_text("[]")
    with pytest.raises(ShardError, match="its statistics cannot be read"):
        read_shard(shard, "drawn")
    shard.unlink()
    with pytest.raises(ShardError, match="cannot be read"):
        read_shard(shard, "drawn")


def test_offsets_point_at_what_another_library_reads(shard: Path) -> None:
    data = shard.read_bytes()
    own = read_shard(shard, "drawn")
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert len(own.samples) == len(theirs) == 6
    rows = own.samples.to_pylist()
    for row, sample in zip(rows, theirs, strict=True):
        assert data[row["offset"] : row["offset"] + row["size"]] == sample["jpg"]
        assert row["key"] == sample["__key__"]
        assert row["caption"] == sample["txt"].decode()
        assert (row["width"], row["height"], row["orientation"]) == (64, 64, 1)
    assert len({row["uid"] for row in rows}) == 6
    assert own.sha256 == hashlib.sha256(data).hexdigest()
    assert (own.bytes, own.modified_ns) == (len(data), shard.stat().st_mtime_ns)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read(tmp_path: Path, good: dict[str, bytes], format: int) -> None:
    path = tmp_path / "kinds.tar"
    long = "k" * (200 if format != tarfile.USTAR_FORMAT else 90)
    keys = ["short", long, *(["größe"] if format != tarfile.USTAR_FORMAT else [])]
    write_samples(path, dict.fromkeys(keys, good), format)
    rows = read_shard(path, "drawn").samples.to_pylist()
    assert [row["key"] for row in rows] == keys
    for row in rows:
        assert path.read_bytes()[row["offset"] : row["offset"] + row["size"]] == good["jpg"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_samples_are_left_out_and_counted(shard: Path, good: dict[str, bytes]) -> None:
    huge = io.BytesIO()
    Image.new("1", (11_000, 11_000)).save(huge, "PNG")
    write_samples(
        shard,
        {
            "whole": good,
            "no_text": {"jpg": good["jpg"], "json": good["json"]},
            "text_alone": {"txt": good["txt"]},
            "no_image": {**good, "jpg": b"not an image"},
            "cut_header": {**good, "jpg": good["jpg"][:50]},
            "huge": {**good, "jpg": huge.getvalue()},
            "no_words": {**good, "txt": b" "},
            "nothing": {**good, "txt": b"\r\n", "json": b"{}"},
            "latin": {**good, "txt": "größe".encode("latin-1"), "json": b"{}"},
            "../escape": good,
            "/root": good,
            "": good,
            "list": {**good, "json": b"[]"},
            "badexif": {**good, "json": json.dumps({"exif": "[]"}).encode()},
            "half_character": {**good, "json": b'{"url": "\\ud800"}'},
        },
    )
    reading = read_shard(shard, "drawn")
    # Names are labels, never paths, and the JSON is not needed where there is a text.
    whole = ["whole", "no_text", "no_words", "../escape", "/root", "list", "badexif", "half_character"]
    assert reading.samples["key"].to_pylist() == whole
    assert reading.broken == {
        "no image member": 1,
        "cannot be decoded: header": 2,
        "too many pixels": 1,
        "no caption": 1,
        "caption is not UTF-8": 1,
    }


def test_links_and_large_members_are_left_out_and_repeated_keys_stay(
    tmp_path: Path, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "odd.tar"
    monkeypatch.setattr("data_pipeline.index.tar_members.CONTENT_BYTES", len(good["jpg"]))
    members = [(f"{key}.{suffix}", content) for key in ("one", "two", "one") for suffix, content in good.items()]
    members += [("three.jpg", good["jpg"]), *((f"three.{suffix}", content) for suffix, content in good.items())]
    members += [(f"four.{suffix}", content) for suffix, content in {**good, "jpg": good["jpg"] * 2}.items()]
    write_tar(path, members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("five.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    reading = read_shard(path, "drawn")
    assert reading.samples["key"].to_pylist() == ["one", "two", "one", "three"]
    assert reading.broken == {"no caption": 1, "too many bytes": 1, "not a regular file": 1}


def test_a_image_damaged_behind_its_header_is_found_by_decoding(shard: Path, good: dict[str, bytes]) -> None:
    with_half_its_content = good["jpg"][: (good["jpg"].index(b"\xff\xda") + len(good["jpg"])) // 2]
    write_samples(shard, {"whole": good, "half": {**good, "jpg": with_half_its_content}})
    assert len(read_shard(shard, "drawn").samples) == 2
    decoded = read_shard(shard, "drawn", decoded=True)
    assert decoded.samples["key"].to_pylist() == ["whole"]
    assert decoded.broken == {"cannot be decoded: content": 1}


def test_the_name_that_select_gave_is_kept(shard: Path, good: dict[str, bytes]) -> None:
    names = {"kept": "0" * 31 + "a", "foreign": "12345", "upper": "A" * 32, "none": None}
    samples = {
        key: {**good, "json": json.dumps({"url": "http://a/b", "uid": uid}).encode()} for key, uid in names.items()
    }
    write_samples(shard, {**samples, "no_url": {**good, "json": b"{}"}})
    found = read_shard(shard, "drawn").samples
    uids = dict(zip(found["key"].to_pylist(), found["uid"].to_pylist(), strict=True))
    made = pair_uid("drawn", "http://a/b", good["txt"].decode())
    assert uids == {
        "kept": names["kept"],
        **dict.fromkeys(("foreign", "upper", "none"), made),
        "no_url": pair_uid("drawn", f"no_url {hashlib.sha256(good['jpg']).hexdigest()}", good["txt"].decode()),
    }


def test_images_that_lie_on_their_side_are_listed_as_they_are_to_be_seen(
    tmp_path: Path, good: dict[str, bytes]
) -> None:
    def image(tag: int | None) -> bytes:
        file, exif = io.BytesIO(), Image.Exif()
        if tag is not None:
            exif[0x0112] = tag
        Image.new("RGB", (96, 64)).save(file, "JPEG", exif=exif)
        return file.getvalue()

    # Encoded anew, the tag is in the metadata alone; else it is in both places.
    samples = {
        f"named{number}": {
            "jpg": image(None if number % 2 else number),
            "txt": good["txt"],
            "json": json.dumps({"exif": json.dumps({"Image Orientation": name})}).encode(),
        }
        for name, number in [*ORIENTATIONS.items(), ("0", 0)]
    }
    for tag in (1, 6, 9):
        samples[f"tagged{tag}"] = {"jpg": image(tag), "txt": good["txt"], "json": b'{"exif": null}'}
    path = tmp_path / "turned.tar"
    write_samples(path, samples)
    reading = read_shard(path, "drawn")
    assert not reading.broken
    found = {row["key"]: (row["orientation"], row["width"], row["height"]) for row in reading.samples.to_pylist()}
    upright, sideways = (96, 64), (64, 96)
    assert found == {
        **{f"named{number}": (number, *(sideways if number >= 5 else upright)) for number in range(1, 9)},
        "named0": (1, *upright),
        "tagged1": (1, *upright),
        "tagged6": (6, *sideways),
        "tagged9": (1, *upright),
    }


def test_the_names_of_orientations_are_those_that_img2dataset_writes(tmp_path: Path) -> None:
    import exifread

    for name, number in ORIENTATIONS.items():
        file, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = number
        Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
        file.seek(0)
        assert str(exifread.process_file(file, details=False)["Image Orientation"]).strip() == name
