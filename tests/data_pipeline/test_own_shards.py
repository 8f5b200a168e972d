"""Tars that other programs made: every good sample is listed, what is left out is counted, and nothing is an error."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.download.part import Part, Record
from data_pipeline.index.index import index
from data_pipeline.index.shard_reading import ShardError, ShardScan, read_shard
from tests.pairs import all_samples, write_shard
from vdtrain.commands.train import main as train
from vdtrain.config.command_schema import DataPipelineConfig
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.data.manifest import Manifest, read_shards
from vdtrain.data.stream import PairStream
from vdtrain.errors import NothingError

Members = list[tuple[str, bytes]]


def image(kind: str = "JPEG", size: tuple[int, int] = (48, 32), tag: int | None = None, shade: int = 0) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if tag is not None:
        exif[0x0112] = tag
    Image.new("RGB", size, (shade, 200, 100)).save(file, kind, **({"exif": exif} if tag is not None else {}))
    return file.getvalue()


J, P, W = image(), image("PNG"), image("WEBP")


def document(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def write_tar(path: Path, members: Members, format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read(path: Path, caption: str | None = None, decoded: bool = False) -> ShardScan:
    return read_shard(path, "own", path.name, decoded, caption, own=True)


def listed(scan: ShardScan) -> dict[str, str]:
    """Captions by key."""
    return dict(zip(scan.samples["key"].to_pylist(), scan.samples["caption"].to_pylist(), strict=True))


# What a tar has -> keys and captions, and what is left out.
NAMES: dict[str, tuple[Members, dict[str, str], dict[str, int]]] = {
    "no JSON": ([("a.jpg", J), ("a.txt", b"x")], {"a": "x"}, {}),
    "a dot and a slash": ([("./a.jpg", J), ("./a.txt", b"x")], {"a": "x"}, {}),
    "folders": (
        [("./", b""), ("x/a.jpg", J), ("x/a.txt", b"x"), ("y/a.jpg", P), ("y/a.txt", b"y")],
        {"x/a": "x", "y/a": "y"},
        {},
    ),
    "a folder with dots": ([("v1.0/a.jpg", J), ("v1.0/a.txt", b"x")], {"v1.0/a": "x"}, {}),
    "large letters": ([("a.JPG", J), ("a.TXT", b"x"), ("b.Jpeg", J), ("b.txt", b"y")], {"a": "x", "b": "y"}, {}),
    "four formats": (
        [
            (f"{key}.{suffix}", content)
            for key, suffix, picture in (("a", "jpg", J), ("b", "jpeg", J), ("c", "png", P), ("d", "webp", W))
            for suffix, content in ((suffix, picture), ("txt", key.encode()))
        ],
        {"a": "a", "b": "b", "c": "c", "d": "d"},
        {},
    ),
    "another format than its name says": ([("a.jpg", P), ("a.txt", b"x")], {"a": "x"}, {}),
    "members apart": ([("a.jpg", J), ("b.jpg", J), ("a.txt", b"x"), ("b.txt", b"y")], {"a": "x", "b": "y"}, {}),
    "other members": (
        [("a.cls", b"3"), ("a.jpg", J), ("a.npy", b"\x93NUMPY"), ("a.txt", b"x"), ("a.mp3", b"")],
        {"a": "x"},
        {},
    ),
    "pictures beside the picture": (
        [("a.0.jpg", W), ("a.jpg", J), ("a.seg.png", P), ("a.thumb.jpg", W), ("a.txt", b"x")],
        {"a": "x"},
        {},
    ),
    "a numbered picture": ([("a.0.jpg", J), ("a.1.jpg", W), ("a.txt", b"x")], {"a": "x"}, {}),
    "names inside the sample": ([("a.caption.txt", b"x"), ("a.image.jpg", J), ("a.mask.png", P)], {"a": "x"}, {}),
    "a mask of the same name": ([("a.png", P), ("a.jpg", J), ("a.txt", b"x")], {"a": "x"}, {}),
    "a mask alone": ([("a.seg.png", P), ("a.txt", b"x")], {}, {"no image member": 1}),
    "file names with dots": (
        [("b.2020.01.jpg", J), ("b.2020.01.txt", b"x"), ("b.2020.02.jpg", J), ("b.2020.02.txt", b"y")],
        {"b.2020.01": "x", "b.2020.02": "y"},
        {},
    ),
    "one of them without a caption": (
        [("b.1.jpg", J), ("b.1.txt", b"x"), ("b.2.jpg", J)],
        {"b.1": "x"},
        {"no caption": 1},
    ),
    "a sample and a file name that begins like it": (
        [("a.b.jpg", P), ("a.b.txt", b"y"), ("a.jpg", J), ("a.txt", b"x")],
        {"a.b": "y", "a": "x"},
        {},
    ),
    "several captions": ([("a.0.txt", b"x"), ("a.1.txt", b"y"), ("a.jpg", J)], {"a": "x"}, {}),
    "a caption by another extension": (
        [("a.caption", b"x"), ("a.jpg", J), ("b.jpg", J), ("b.text", b"y")],
        {"a": "x", "b": "y"},
        {},
    ),
    "what a Mac adds": (
        [
            *(("._a.jpg", b"mac"), ("a.jpg", J), ("._a.txt", b"mac"), ("a.txt", b"x"), (".DS_Store", b"mac")),
            *(("__MACOSX/._a.jpg", b"mac"), ("x/.hidden.jpg", J)),
        ],
        {"a": "x"},
        {},
    ),
    "what no sample is made of": ([("README", b"read"), ("a.jpg", J), ("a.txt", b"x"), ("a.", b"")], {"a": "x"}, {}),
    "a class instead of a caption": ([("a.cls", b"3"), ("a.jpg", J)], {}, {"no caption": 1}),
    "numbers as keys": ([("7.jpg", J), ("7.txt", b"7")], {"7": "7"}, {}),
    "spaces and other letters": ([("grün 1.jpg", J), ("grün 1.txt", "größe".encode())], {"grün 1": "größe"}, {}),
    "paths out of a folder": ([("../a.jpg", J), ("../a.txt", b"x")], {"../a": "x"}, {}),
    "a name that is not UTF-8": (
        [(os.fsdecode(b"gr\xfcn.jpg"), J), (os.fsdecode(b"gr\xfcn.txt"), b"x")],
        {"gr\\udcfcn": "x"},
        {},
    ),
    "no caption, empty, not UTF-8, no image, no member": (
        [
            *(("a.jpg", J), ("b.jpg", J), ("b.txt", b" \r\n"), ("c.jpg", J), ("c.txt", b"\xff\xfa")),
            *(("d.jpg", b"<html>"), ("d.txt", b"x"), ("e.mp4", b"video"), ("e.txt", b"x")),
        ],
        {},
        {"no caption": 2, "caption is not UTF-8": 1, "cannot be decoded: header": 1, "no image member": 1},
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_members_are_put_together_by_their_names(tmp_path: Path, case: str) -> None:
    members, captions, broken = NAMES[case]
    path = write_tar(tmp_path / "a.tar", members)
    scan = read(path)
    assert (listed(scan), scan.broken) == (captions, broken)
    data = path.read_bytes()
    contents = {content for _, content in members}
    for row in scan.samples.to_pylist():
        found = data[row["offset"] : row["offset"] + row["size"]]
        assert found in contents - {W} if case != "four formats" else found in contents
        assert (row["width"], row["height"], row["orientation"]) == (48, 32, 1)
    assert len(set(scan.samples["uid"].to_pylist())) == len(captions)


# Contents of `a.txt` and `a.json`, and the setting -> the caption, or why there is none.
CAPTIONS: dict[str, tuple[bytes | None, bytes | None, str | None, str]] = {
    "a mark and line ends of Windows": (b"\xef\xbb\xbfone\r\ntwo\r\n", None, None, "one\ntwo"),
    "UTF-16 with its mark": ("größe".encode("utf-16"), None, None, "größe"),
    "the text before the JSON": (b"x", document(caption="y"), None, "x"),
    "the JSON without a text": (None, document(caption="y"), None, "y"),
    "the JSON instead of an empty text": (b"", document(text="y"), None, "y"),
    "a named field": (b"x", document(caption="y", title=" z\r\n"), "title", "z"),
    "a field inside another": (b"x", document(meta={"title": "z"}), "meta.title", "z"),
    "a field with a dot": (b"x", document(**{"meta.title": "z"}), "meta.title", "z"),
    "a field that is not there": (b"x", document(caption="y"), "title", "no caption"),
    "no JSON for a field": (b"x", None, "title", "no caption"),
    "the first of a list": (None, document(caption=["", "one", "two"]), None, "one"),
    "a number": (None, document(caption=1984), None, "1984"),
    "a truth value, null, an object": (None, document(caption=True, text={"en": "x"}), None, "no caption"),
    "not a number": (None, b'{"caption": NaN}', None, "no caption"),
    "half a character": (None, b'{"caption": "\\ud800x"}', None, "?x"),
    "JSON with a mark": (None, b"\xef\xbb\xbf" + document(caption="y"), None, "y"),
    "broken JSON beside a text": (b"x", b"{", None, "x"),
    "broken JSON": (None, b"{", None, "metadata is not a JSON object"),
    "a list as JSON": (None, b"[1]", None, "metadata is not a JSON object"),
    "JSON that is too deep": (None, b"[" * 100_000, None, "metadata is not a JSON object"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions(tmp_path: Path, case: str) -> None:
    text, metadata, setting, expected = CAPTIONS[case]
    parts = {"jpg": J, "txt": text, "json": metadata}
    members = [(f"a.{suffix}", content) for suffix, content in parts.items() if content is not None]
    scan = read(write_tar(tmp_path / "a.tar", members), setting)
    assert [*listed(scan).values(), *scan.broken] == [expected]


@pytest.mark.parametrize(
    ("tag", "exif", "expected"),
    [
        (None, {}, 1),
        (6, {}, 6),
        (6, {"exif": None}, 6),
        (6, {"exif": "{}"}, 6),
        (None, {"exif": '{"Image Orientation": "Rotated 90 CW"}'}, 6),
        (None, {"exif": {"Image Orientation": "Rotated 90 CW"}}, 6),
        (None, {"exif": {"Orientation": 6}}, 6),
        (None, {"exif": {"Orientation": True}}, 1),
        (None, {"exif": "not JSON"}, 1),
        (None, {"exif": [6]}, 1),
        # The file was turned and its tag with it; the note is of the original.
        (1, {"exif": '{"Image Orientation": "Rotated 90 CW"}'}, 1),
        # No viewer knows such a value.
        (9, {"exif": {"Orientation": 9}}, 1),
    ],
)
def test_orientation(tmp_path: Path, tag: int | None, exif: dict[str, Any], expected: int) -> None:
    members: Members = []
    for kind in ("JPEG", "PNG", "WEBP"):
        members += [(f"{kind}.{kind.lower()}", image(kind, tag=tag)), (f"{kind}.txt", b"x")]
        # Sizes in the metadata are often those of another picture.
        members.append((f"{kind}.json", document(**exif, width=7, height=7)))
    rows = read(write_tar(tmp_path / "a.tar", members)).samples.to_pylist()
    sizes = (32, 48) if expected >= 5 else (48, 32)
    assert [(row["orientation"], row["width"], row["height"]) for row in rows] == 3 * [(expected, *sizes)]


def three(folder: Path) -> tuple[bytes, list[int], list[int]]:
    """A tar of three samples, the offsets of its headers, and the ends of its contents."""
    members = [(f"{key}.{suffix}", content) for key in "abc" for suffix, content in (("jpg", J), ("txt", key.encode()))]
    path = write_tar(folder / "whole.tar", members)
    with tarfile.open(path) as tar:
        found = tar.getmembers()
    return path.read_bytes(), [each.offset for each in found], [each.offset_data + each.size for each in found]


DAMAGE: dict[str, tuple[Callable[[bytes, list[int], list[int]], bytes], str, bool]] = {
    "no blocks of zeros": (lambda data, starts, ends: data[: -(-ends[-1] // 512) * 512], "abc", False),
    "one block of zeros": (lambda data, starts, ends: data[: -(-ends[-1] // 512) * 512 + 512], "abc", False),
    "no padding": (lambda data, starts, ends: data[: ends[-1]], "abc", False),
    "two tars in one file": (lambda data, starts, ends: data + data, "abcabc", False),
    "bytes behind the end": (lambda data, starts, ends: data + b"more", "abc", True),
    "a page behind the end": (lambda data, starts, ends: data + b"<html>".ljust(512) * 3, "abc", True),
    "cut inside the last text": (lambda data, starts, ends: data[: starts[5] + 512], "ab", True),
    "cut inside a picture": (lambda data, starts, ends: data[: starts[4] + 700], "ab", True),
    "cut inside a header": (lambda data, starts, ends: data[: starts[4] + 100], "ab", True),
    "a damaged header": (lambda data, starts, ends: data[: starts[2]] + b"?" + data[starts[2] + 1 :], "ac", True),
    "a lost block": (lambda data, starts, ends: data[: starts[2]] + bytes(512) + data[starts[2] + 512 :], "ac", True),
    "a first header that is damaged": (lambda data, starts, ends: b"?" + data[1:], "bc", True),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_costs_only_the_samples_it_is_in(tmp_path: Path, case: str) -> None:
    change, keys, told = DAMAGE[case]
    path = tmp_path / "a.tar"
    path.write_bytes(change(*three(tmp_path)))
    scan = read(path)
    assert "".join(scan.samples["caption"].to_pylist()) == keys
    assert bool(scan.damage) == told or case == "a lost block"
    assert bool(scan.broken) == told
    for row in scan.samples.to_pylist():
        assert path.read_bytes()[row["offset"] : row["offset"] + row["size"]] == J


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>" * 100, "is not a tar"),
        (gzip.compress(bytes(10240), mtime=0), "is compressed by gzip, .*decompress it"),
    ],
)
def test_what_is_no_tar_is_one_line(tmp_path: Path, data: bytes, expected: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ShardError, match=rf"a\.tar: {expected}") as raised:
        read(tmp_path / "a.tar")
    assert not re.search("remove|delete|download", str(raised.value))


def test_all_that_webdataset_reads_is_listed(tmp_path: Path) -> None:
    """Random names and orders: what its reader takes as an image with a text is a row with the same bytes."""
    generator = random.Random(0)
    for number in range(60):
        members: Members = []
        for _ in range(generator.randrange(1, 25)):
            stem = generator.choice(("", "./", "x/", "x.y/")) + generator.choice(("a", "b", "c.d", "e.f.g"))
            suffix = generator.choice(("jpg", "JPG", "png", "txt", "txt", "json", "seg.png", "0.jpg", "0.txt", "cls"))
            content = {"txt": os.urandom(4).hex().encode(), "json": document(caption="told")}.get(
                suffix[-3:].lower(), image(shade=generator.randrange(256))
            )
            members.append((f"{stem}.{suffix}", content))
        path = write_tar(tmp_path / f"{number}.tar", members)
        data, rows = path.read_bytes(), read(path).samples.to_pylist()
        own = {(data[row["offset"] : row["offset"] + row["size"]], row["caption"].encode()) for row in rows}
        theirs = webdataset.WebDataset(str(path), shardshuffle=False, handler=webdataset.handlers.ignore_and_continue)
        for sample in theirs:
            picture = next((sample[each] for each in ("jpg", "jpeg", "webp", "png") if each in sample), None)
            if picture is not None and "txt" in sample:
                assert (picture, sample["txt"]) in own, (members, sample["__key__"])


def write_own(folder: Path, count: int = 4) -> Path:
    """A tar of drawn images without a word about its making."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "a.tar", count, seed=len(list(folder.parent.rglob("*.tar"))))
    (folder / "a_stats.json").unlink()
    return folder


def run(folder: Path, *words: str, manifest: str = "manifest") -> int:
    settings = [f"data.root={folder}", f"data.manifest={folder / manifest}", "data.index.processes=1"]
    return main(["index", "data=own", *settings, *words])


def test_the_writers_of_real_libraries_are_read_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ShardWriter of webdataset, GNU tar over a folder, and img2dataset's writer; the stream then reads them all."""
    from img2dataset.writer import WebDatasetSampleWriter

    shards = tmp_path / "shards"
    shards.mkdir()
    with webdataset.ShardWriter(f"{shards}/w-%06d.tar", maxcount=3, verbose=0) as writer:
        for number in range(5):
            pixels = np.full((40, 40, 3), number * 40, np.uint8)
            writer.write(
                {"__key__": f"{number:06d}", "jpg": pixels, "txt": f"w{number}", "json": {"n": number}, "cls": 1}
            )
    photos = tmp_path / "photos"
    for number in range(5):
        place = photos / f"{number % 2}.day"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"IMG_2020.{number}.JPG").write_bytes(image(size=(40, 40), shade=number))
        (place / f"IMG_2020.{number}.txt").write_text(f"t{number}\n")
    for flags in ("--format=gnu", "--format=pax", "--format=ustar"):
        subprocess.run(["tar", flags, "-cf", str(shards / f"t{flags[9:]}.tar"), "."], cwd=photos, check=True)
    schema = pa.schema([("caption", "string"), ("url", "string"), ("exif", "string")])
    i2d = WebDatasetSampleWriter(0, str(shards), True, 5, schema, "jpg")
    for number in range(5):
        told = {"caption": f"i{number}", "url": f"http://a/{number}", "exif": "{}"}
        i2d.write(image(size=(40, 40), shade=number), f"{number:09d}", f"i{number}", told)
    i2d.close()
    (shards / "00000.parquet").unlink(missing_ok=True)
    assert run(tmp_path, f"data.shards={shards}") == 0
    assert "25 samples in 6 shards, 6 of them new; left out: none" in capsys.readouterr().out
    rows = all_samples(tmp_path / "manifest")
    expected = [f"{letter}{number}" for letter in ("i", *3 * "t", "w") for number in range(5)]
    assert sorted(rows["caption"].to_pylist()) == sorted(expected)
    assert set(read_shards(tmp_path / "manifest")["source"].to_pylist()) == {"own"}
    stream = PairStream(tmp_path / "manifest", seed=0, resolution=32, global_batch_size=25, workers=1)
    batch = next(iter(stream))
    stream.close()
    assert sorted(batch.samples["text"]) == sorted(expected)
    assert not batch.replaced
    # Training takes the manifest, with the setting or without it.
    assert run(tmp_path, f"data.shards={shards}") == 0
    assert "25 samples in 6 shards, 0 of them new" in capsys.readouterr().out


def test_a_tar_and_several_folders_with_or_without_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(write_own(tmp_path / "a") / "b.tar", 3, seed=7)
    write_own(tmp_path / "b" / "deep")
    # The tar was filtered after its download, which is nothing to us.
    (tmp_path / "a" / "b_stats.json").write_text('{"successes": 99}')
    both = f"data.shards=[{tmp_path / 'a'},{tmp_path / 'b'}]"
    assert run(tmp_path, both) == 0
    assert "11 samples in 3 shards" in capsys.readouterr().out
    assert run(tmp_path, f"data.shards=[{tmp_path / 'b'},{tmp_path / 'a'},{tmp_path / 'a' / 'b.tar'}]") == 0
    assert "11 samples in 3 shards, 0 of them new" in capsys.readouterr().out
    assert run(tmp_path, f"data.shards={tmp_path / 'a' / 'b.tar'}", manifest="one") == 0
    assert "3 samples in 1 shards" in capsys.readouterr().out
    # Beside the sets of the download, which keep their own rule, and one of which may be called `own` too.
    with pytest.raises(ShardError, match=r"data\.shards=.*deep: lies in data\.sources\.laion\.shards="):
        index({"laion": tmp_path / "b"}, tmp_path / "mixed", own=[tmp_path / "b" / "deep"])
    (tmp_path / "a" / "b_stats.json").write_text('{"successes": 3}')
    index({"laion": tmp_path / "a"}, tmp_path / "mixed", own=[tmp_path / "b"])
    assert read_shards(tmp_path / "mixed")["source"].to_pylist() == ["laion", "own"]
    index({"own": tmp_path / "a"}, tmp_path / "named")
    assert len(Manifest(tmp_path / "named").paths) == 1
    with pytest.raises(ShardError, match=r"data\.sources\.own: is the name of the source of data\.shards"):
        index({"own": tmp_path / "a"}, tmp_path / "named", own=[tmp_path / "b"])


def test_another_field_of_captions_reads_the_shards_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "a.tar", [("a.jpg", J), ("a.json", document(title="one", alt="two"))])
    for _ in range(2):
        assert run(tmp_path, f"data.shards={shards}") == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 2
    assert "no sample in 1 shards; left out: 1 no caption; " in shown
    assert "(here title, alt) by data.index.caption" in shown
    for field, expected in (("title", "one"), ("alt", "two")):
        assert run(tmp_path, f"data.shards={shards}", f"data.index.caption={field}") == 0
        assert all_samples(tmp_path / "manifest")["caption"].to_pylist() == [expected]
        assert run(tmp_path, f"data.shards={shards}", f"data.index.caption={field}") == 0
        assert "1 samples in 1 shards, 0 of them new" in capsys.readouterr().out


def test_nothing_to_index_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("empty", "pictures", "packed", "html", "left out", "bare"):
        (tmp_path / name).mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(J)
    (tmp_path / "packed" / "a.tar.gz").write_bytes(gzip.compress(bytes(10240), mtime=0))
    (tmp_path / "html" / "a.tar").write_bytes(b"<html>" * 1000)
    (tmp_path / "gzip.tar").write_bytes(gzip.compress(bytes(10240), mtime=0))
    write_tar(tmp_path / "left out" / "a.tar", [("a.jpg", J), ("b.txt", b"x")])
    write_tar(tmp_path / "bare" / "a.tar", [])
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for place, expected in {
        "": "data.shards: empty; name the folder of your tars, data.shards=FOLDER",
        "gone": "data.shards=FOLDER/gone: is not there; mount its disk, or give the folder of your tars",
        "link": "data.shards=FOLDER/link: leads to FOLDER/disk, which does not exist; mount its disk, or give",
        "empty": "data.shards=FOLDER/empty: no .tar there (no file at all); give the folder of your tars, or make",
        "pictures": "data.shards=FOLDER/pictures: no .tar there (1 .jpg); ",
        "packed": "data.shards=FOLDER/packed: 1 compressed tars, and samples are read by their place; decompress them",
        "packed/a.tar.gz": "data.shards=FOLDER/packed/a.tar.gz: 1 compressed tars",
        "html": "no sample in 1 shards; left out: 1 shards as said above; ",
        "gzip.tar": "no sample in 1 shards; left out: 1 shards as said above; ",
        "left out": "no sample in 1 shards; left out: 1 no caption, 1 no image member; give each image a .txt",
        "bare": "no sample in 1 shards; left out: none; a sample is an image (jpg, ",
    }.items():
        words = [f"data.shards={tmp_path / place}"] if place else []
        for _ in range(2):
            assert run(tmp_path, *words, manifest=f"of {place.replace('/', '-')}") == 1, place
            shown = capsys.readouterr().err
            assert shown.startswith("error: "), shown
            assert shown.count("\n") == 1, shown
            assert expected in shown.replace(str(tmp_path), "FOLDER"), shown
            assert not re.search(r"remove|delete|download", shown), shown
    assert run(tmp_path, "data.shards=s3://bucket/shards") == 1
    assert "data.shards=s3://bucket/shards: is an address" in capsys.readouterr().err


def test_links_are_followed_and_every_file_comes_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards, disk = tmp_path / "shards", tmp_path / "disk"
    for number in range(4):
        write_own(shards / f"{number:05d}", 2)
        write_own(disk / f"{number:05d}", 3)
    (shards / "more").symlink_to(disk)
    (shards / "one.tar").symlink_to(disk / "00000" / "a.tar")
    (shards / "again").symlink_to(shards / "00000")
    (shards / "00001" / "up").symlink_to(shards)
    (shards / "round").symlink_to("round")
    (disk / "00002" / "back").symlink_to(shards / "00003")
    (shards / "notes.txt").symlink_to("nowhere")
    os.mkfifo(shards / "pipe.tar")
    (shards / "._a.tar").write_bytes(b"mac")
    index({}, tmp_path / "manifest", own=[shards])
    found = Manifest(tmp_path / "manifest")
    assert len(found) == 4 * 2 + 4 * 3
    assert len({os.path.realpath(tmp_path / "manifest" / path) for path in found.paths}) == len(found.paths) == 8
    assert "../shards/00000/a.tar" in found.paths
    assert sum("notes.txt: leads to nowhere" in each for each in caplog.messages) == 1
    caplog.clear()
    # The same through a link to the root, and in a second folder.
    (tmp_path / "root").symlink_to(shards)
    index({}, tmp_path / "other", own=[tmp_path / "root", disk, shards])
    assert len(Manifest(tmp_path / "other")) == 4 * 2 + 4 * 3


def test_shards_that_moved_to_another_disk_and_are_linked_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part, a single tar, and the whole folder, of a download and of one's own."""
    laion, own = tmp_path / "laion", tmp_path / "own"
    for number in range(3):
        write_own(own / f"{number}")
        (laion / f"{number}").mkdir(parents=True)
        write_shard(laion / f"{number}" / "a.tar", 4, seed=50 + number)
    index({"laion": laion}, tmp_path / "manifest", own=[own])
    before, disk = all_samples(tmp_path / "manifest"), tmp_path / "disk"
    disk.mkdir()
    for number, place in enumerate((own / "0", laion / "1", own / "2" / "a.tar", laion, own)):
        place.rename(disk / str(number))
        place.symlink_to(disk / str(number))
        capsys.readouterr()
        index({"laion": laion}, tmp_path / "manifest", own=[own])
        assert "24 samples in 6 shards, 0 of them new" in capsys.readouterr().out
        assert all_samples(tmp_path / "manifest").equals(before)
    assert not caplog.messages
    # The disk is not there for once.
    for number in (0, 4):
        (disk / str(number)).rename(disk / "away")
        with pytest.raises((ShardError, NothingError), match=r"leads to .*, which does not exist"):
            index({"laion": laion}, tmp_path / "manifest", own=[own])
        (disk / "away").rename(disk / str(number))
    assert len(Manifest(tmp_path / "manifest")) == 24


def test_a_disk_that_is_not_mounted_drops_nothing(tmp_path: Path) -> None:
    own = write_own(tmp_path / "own")
    index({}, tmp_path / "manifest", own=[own])
    (own / "a.tar").rename(tmp_path / "a.tar")
    told = r"data\.shards=.*: the folder is empty, and .* lists 1 shards of it; bring it back"
    with pytest.raises(NothingError, match=told):
        index({}, tmp_path / "manifest", own=[own])
    with pytest.raises(ShardError, match=told):
        index({}, tmp_path / "manifest", own=[write_own(tmp_path / "other"), own])
    assert len(Manifest(tmp_path / "manifest")) == 4


def test_what_is_passed_over_or_dropped_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = write_own(tmp_path / "one"), write_own(tmp_path / "two")
    (two / "b.tar.gz").write_bytes(b"")
    path = write_tar(two / "cut.tar", [("a.jpg", J), ("a.txt", b"x"), ("b.jpg", J), ("b.txt", b"y")])
    os.truncate(path, 2600)
    index({}, tmp_path / "manifest", own=[one])
    index({}, tmp_path / "manifest", own=[two])
    said = [each.replace(str(tmp_path), "FOLDER") for each in caplog.messages]
    assert said == [
        "passed over: 1 compressed tars: FOLDER/two/b.tar.gz",
        "damaged: FOLDER/two/cut.tar: cut short; its whole samples are listed",
        "dropped: 1 shards that no setting names any more: ../one/a.tar",
    ]
    assert len(Manifest(tmp_path / "manifest")) == 5
    assert json.loads(read_shards(tmp_path / "manifest")["broken"].to_pylist()[1])["damaged part of a tar"] == 1


def test_a_folder_that_cannot_be_read_drops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, scan = write_own(tmp_path / "own" / "deep").parent, os.scandir
    index({}, tmp_path / "manifest", own=[own])

    def refusing(place: str) -> Any:
        if str(place).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ShardError, match=r"deep: cannot be read \(permission denied to .*\); give that user access"):
        index({}, tmp_path / "manifest", own=[own])
    assert len(Manifest(tmp_path / "manifest")) == 4


def test_the_other_commands_name_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("select", "download"):
        assert main([command, "data=own"]) == 2
        assert "data.sources: empty; data=own has shards already" in capsys.readouterr().err
    tiny = ["model=tiny", "data=own", "hardware=cpu", "tracking=none", f"data.root={tmp_path}"]
    for word, shown in (("", "data.shards=FOLDER"), ("data.shards=x", "data.shards=x"), ("data.shards=[x,y]", None)):
        assert train([*tiny, *[word] * bool(word)]) == 2
        assert f"`python -m data_pipeline index data=own {shown or word}`" in capsys.readouterr().err


def test_a_download_touches_no_tar_that_it_did_not_make(tmp_path: Path) -> None:
    """It clears away what an interrupted download left, which has a plan."""
    own = write_own(tmp_path / "shards" / "00000")
    part = Part("own", 0, tmp_path / "00000.parquet", own, 1, 1)
    pq.write_table(pa.table({"url": ["http://a/b"]}), part.urls)
    config = to_object(compose("data_pipeline", ["data=shapes"]), DataPipelineConfig).data.download
    with pytest.raises(ConfigError, match=r"00000 has shards without 00000\.plan\.json, .*; give another folder"):
        Record(part, config)
    assert (own / "a.tar").exists()
