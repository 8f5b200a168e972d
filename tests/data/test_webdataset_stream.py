"""Tars read straight from their addresses: how they are named, grouped, shared and mixed, and what is bad in them."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import socket
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image

from tests.data.test_remote_shards import Handler, Server
from tests.pairs import write_pairs
from vdtrain.data.batch import Batch
from vdtrain.data.manifest import Manifest
from vdtrain.data.stream import PairStream, StreamError
from vdtrain.data.tar_samples import CutError, samples
from vdtrain.data.webdataset_stream import WebDatasetStream
from vdtrain.errors import ConfigError
from vdtrain.storage import patience

COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    write_pairs(folder, shards=4, count=COUNT)
    return folder


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def read(*urls: str, batches: int = 4, **settings: Any) -> list[Batch]:
    stream = WebDatasetStream(urls=urls, **{"seed": 0, "resolution": 32, "global_batch_size": 12, **settings})
    try:
        return list(islice(stream, batches))
    finally:
        stream.close()


def texts(batches: list[Batch]) -> list[str]:
    return [text for batch in batches for text in batch.samples["text"]]


def captions(folder: Path) -> list[str]:
    manifest = Manifest(folder / "manifest")
    return [text for shard in range(len(manifest.shards)) for text in manifest.rows(shard).captions.to_pylist()]


def tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return str(path)


def picture(shade: int = 0, side: int = 40, kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(data, kind)
    return data.getvalue()


def pairs(count: int, first: int = 0, **settings: Any) -> dict[str, bytes]:
    made = {}
    for number in range(first, first + count):
        made |= {f"{number:04d}.jpg": picture(number, **settings), f"{number:04d}.txt": f"text {number}".encode()}
    return made


def test_a_pass_delivers_the_samples_of_the_index_once_with_the_same_pixels(folder: Path) -> None:
    """With one thread; both streams crop at the centre."""
    url = f"{folder}/shards/{{000000..000003}}.tar"
    batches = read(url, workers=1, random_crop=False)
    indexed = PairStream(folder / "manifest", seed=1, resolution=32, global_batch_size=48, random_crop=False)
    (whole,) = islice(indexed, 1)
    indexed.close()
    assert texts(batches) != texts([whole])
    images = dict(zip(*rows(whole), strict=True))
    assert Counter(texts(batches)) == Counter(whole.samples["text"])
    unique = {text for text, count in Counter(texts(batches)).items() if count == 1}
    assert unique
    for batch in batches:
        assert batch.samples["image"].shape == (12, 3, 32, 32)
        for text, image in zip(batch.samples["text"], batch.samples["image"], strict=True):
            assert text not in unique or torch.equal(image, images[text])
    assert [batch.positions.tolist() for batch in batches] == [list(range(n, n + 12)) for n in range(0, 48, 12)]


def test_the_order_is_shuffled_by_the_seed_and_other_from_another_position(folder: Path) -> None:
    url = f"{folder}/shards"
    first = texts(read(url, workers=2, global_batch_size=24, batches=2))
    assert first == texts(read(url, workers=2, global_batch_size=24, batches=2))
    assert first != texts(read(url, workers=2, global_batch_size=24, batches=2, seed=1))
    resumed = read(url, workers=2, global_batch_size=24, batches=2, start=48)
    assert resumed[0].positions.tolist() == list(range(48, 72))
    assert texts(resumed) != first
    assert Counter(texts(resumed)) == Counter(captions(folder)) == Counter(first)


@pytest.mark.parametrize(("ranks", "workers"), [(2, 2), (4, 1), (2, 1)])
def test_ranks_share_the_tars_of_a_pass(folder: Path, ranks: int, workers: int) -> None:
    each = [
        read(f"{folder}/shards/*.tar", rank=rank, world_size=ranks, workers=workers, batches=4) for rank in range(ranks)
    ]
    assert Counter(text for batches in each for text in texts(batches)) == Counter(captions(folder))
    assert [batch.positions[0].item() for batch in each[1]] == [12 * n + 12 // ranks for n in range(4)]


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_tars_than_ranks_leave_no_rank_without_samples(
    folder: Path, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ranks that read the same tar take different samples of it in each pass; a tar of one sample does too."""
    urls = [f"{folder}/shards/00000{number}.tar" for number in range(count)]
    each = []
    for rank in range(4):
        stream = WebDatasetStream(
            urls=urls, seed=0, resolution=32, global_batch_size=4 * 12, rank=rank, world_size=4, workers=8
        )
        each.append(texts(list(islice(stream, 1))))
        assert len(stream.remarks) == 2
        assert f"{count} tars for 4 processes x hardware.loader_workers=8" in stream.remarks[1]
        stream.close()
    if count == 1:
        # Three samples a rank and pass: four passes, which turn the parts.
        assert all(Counter(batch) == Counter(each[0]) for batch in each)
        assert len({text for batch in each for text in batch[:3]}) > 3
    assert capfd.readouterr().err == ""


def test_a_single_sample_serves_every_rank(tmp_path: Path) -> None:
    url = tar(tmp_path / "a.tar", pairs(1))
    for rank in range(3):
        assert texts(read(url, rank=rank, world_size=3, global_batch_size=3)) == ["text 0"] * 4


def test_names_as_people_write_them(tmp_path: Path) -> None:
    """Folders, upper case, dots in keys, members that do not follow each other, other members, hidden files."""
    members = {
        "./x/a.JPG": picture(1),
        "./x/a.seg.png": picture(2, kind="PNG"),
        "./x/a.txt": b"a",
        "./x/._a.jpg": b"from a Mac",
        "__meta__/b.jpg": b"not of a sample",
        "b.depth.png": picture(3, kind="PNG"),
        "b.webp": picture(3, kind="WEBP"),
        "b.cls": b"7",
        "b.npy": b"never loaded",
        "b.txt": b"b",
        "c.1.jpeg": picture(4),
        "c.1.txt": b"c 1",
        "c.2.jpeg": picture(5),
        "c.2.txt": b"c 2",
        "d.png": picture(6, kind="PNG"),
        "e.png": picture(7, kind="PNG"),
        "e.txt": b"e",
        "d.txt": b"d",
        "f.caption": b"not this one",
        "f.png": picture(9, kind="PNG"),
        "f.jpeg": picture(8),
        "f.txt": b"f",
        "f.vis.png": picture(9, kind="PNG"),
    }
    found = read(tar(tmp_path / "a.tar", members), workers=1, global_batch_size=7, batches=2)
    shades = {
        text: image.float().mean().round().item() for batch in found for text, image in zip(*rows(batch), strict=True)
    }
    assert shades == {"a": 1, "b": 3, "c 1": 4, "c 2": 5, "d": 6, "e": 7, "f": 8}
    assert not any(batch.replaced for batch in found)
    # Members beside a picture are no samples that lack something.
    assert streamed(tmp_path / "a.tar") == (["a", "b", "c 1", "c 2", "e", "d", "f"], Counter(), "")


def streamed(path: Path) -> tuple[list[str], Counter[str], str]:
    """Captions of a tar, what is left out of it, and its damage."""
    left_out, found, damage = Counter[str](), list[str](), ""
    with path.open("rb") as file:
        try:
            found.extend(sample.caption for sample in samples(file, None, left_out))
        except CutError as error:
            damage = str(error)
    return found, left_out, damage


@pytest.mark.parametrize("apart", [1, 60, 200])
def test_members_far_apart_are_waited_for_by_few_samples(tmp_path: Path, apart: int) -> None:
    members: dict[str, bytes] = {}
    for ending, content in (("jpg", b"drawn"), ("txt", b"told")):
        members |= {f"{number}.{ending}": content for number in range(apart)}
    found, left_out, damage = streamed(Path(tar(tmp_path / "a.tar", members)))
    assert damage == ""
    if apart < 64:
        assert (len(found), left_out) == (apart, Counter())
    else:
        assert left_out["no caption"] == left_out["no image member"] == apart - len(found) > 64


def test_damage_amid_a_tar_costs_what_follows(tmp_path: Path) -> None:
    path = Path(tar(tmp_path / "a.tar", {f"{n}.{kind}": bytes([65 + n]) for n in range(9) for kind in ("jpg", "txt")}))
    whole = path.read_bytes()
    assert streamed(path) == (list("ABCDEFGHI"), Counter(), "")
    for block, damage, count in (
        # Of a member's header and content each: a header that is none, one of zeros, and a size below 0.
        (24, b"\1" * 512, 6),
        (24, bytes(512), 6),
        (24, whole[24 * 512 : 24 * 512 + 124] + b"\xff" * 12 + whole[24 * 512 + 136 : 25 * 512], 6),
        (26, b"\1" * 512, 6),
    ):
        path.write_bytes(whole[: 512 * block] + damage + whole[512 * (block + 1) :])
        found, left_out, told = streamed(path)
        assert (found, left_out) == (list("ABCDEFGHI")[:count], Counter())
        assert re.match(r"damaged at byte 1[23],\d{3}|cut or damaged \(", told), told


def rows(batch: Batch) -> tuple[list[str], torch.Tensor]:
    return batch.samples["text"], batch.samples["image"]


def test_captions_and_orientation_of_the_json(tmp_path: Path) -> None:
    wide = np.zeros((40, 40, 3), np.uint8)
    wide[:20] = 200
    data = io.BytesIO()
    Image.fromarray(wide).save(data, "PNG")
    described = {
        "title": "from the json",
        "meta": {"alt": "inside"},
        "caption": "no",
        "exif": json.dumps({"Image Orientation": "Rotated 180"}),
    }
    members = {"a.png": data.getvalue(), "a.txt": b"plain", "a.json": json.dumps(described).encode()}
    url = tar(tmp_path / "a.tar", members)
    (plain,) = read(url, batches=1, global_batch_size=1)
    (titled,) = read(url, batches=1, global_batch_size=1, caption="title")
    (inner,) = read(url, batches=1, global_batch_size=1, caption="meta.alt")
    members.pop("a.txt")
    (without,) = read(tar(tmp_path / "b.tar", members), batches=1, global_batch_size=1)
    assert plain.samples["text"] == ["plain"]
    assert inner.samples["text"] == ["inside"]
    assert without.samples["text"] == ["no"]
    assert titled.samples["text"] == ["from the json"]
    assert plain.samples["image"][0, :, 0].max() == 0
    assert plain.samples["image"][0, :, -1].min() == 200
    with pytest.raises(StreamError, match=r"1 tars without one usable sample; .*a\.tar: left out no caption: 1"):
        read(url, caption="alt")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    names = ("pyd", "pickle", "pkl", "pth", "npy", "json", "txt")
    members = {**pairs(4), **{f"9.{name}": pickle.dumps(Bomb()) for name in names}, "9.jpg": picture()}
    read(tar(tmp_path / "a.tar", members))
    assert not (tmp_path / "exploded").exists()


def test_small_images_are_left_out_and_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    members = pairs(10) | pairs(5, first=50, side=20)
    found = read(tar(tmp_path / "a.tar", members), batches=2)
    assert set(texts(found)) == {f"text {number}" for number in range(10)}
    assert "samples left out until now: smaller than 32 pixels: 5" in capfd.readouterr().err
    assert len({*texts(read(str(tmp_path / "a.tar"), batches=4, min_side=20))}) == 15
    with pytest.raises(StreamError, match="left out smaller than 64 pixels: 15"):
        read(str(tmp_path / "a.tar"), resolution=64)


def test_bad_samples_are_replaced_up_to_their_share(tmp_path: Path) -> None:
    members = pairs(30) | {f"{number:04d}.jpg": b"\xff\xd8 no picture" for number in (3, 4)}
    found = read(tar(tmp_path / "a.tar", members), batches=10)
    assert {"text 3", "text 4"}.isdisjoint(texts(found))
    assert sum(sum(batch.replaced.values()) for batch in found) >= 6
    last = r"the last: \S+a\.tar, key 000[34] \(cannot decode: cannot identify its format\)"
    with pytest.raises(
        StreamError, match=rf"were bad \(cannot decode: .*{last}.*data\.stream\.bad_share=0\.01; raise it"
    ):
        read(str(tmp_path / "a.tar"), batches=40)
    assert len(read(str(tmp_path / "a.tar"), batches=40, bad_share=0.2)) == 40


def test_a_cut_tar_and_a_vanished_one_cost_their_own_samples(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is one line; the samples before the cut come, and none gets a caption of another tar."""
    whole = (folder / "shards/000000.tar").read_bytes()
    with tarfile.open(folder / "shards/000000.tar") as file:
        places = [member.offset_data for member in file if member.name.endswith("jpg")]
    cut = folder / "cut.tar"
    cut.write_bytes(whole[: places[5] + 100])
    found = read(str(cut), f"{folder}/gone.tar", f"{folder}/shards/000001.tar", workers=1, batches=6)
    errors = capfd.readouterr().err.splitlines()
    assert [line.split(": ", 1)[1].split("; its other")[0] for line in sorted(errors)] == [
        f"{cut}: cut or damaged (unexpected end of data)",
        f"{folder}/gone.tar: cannot be read (No such file or directory); see that it can be read",
    ]
    manifest = Manifest(folder / "manifest")
    expected = manifest.rows(0).captions.to_pylist()[:5] + manifest.rows(1).captions.to_pylist()
    assert set(texts(found)) == set(expected)
    damaged = folder / "damaged.tar"
    damaged.write_bytes(whole[: places[5] - 512] + b"\x55" * 512 + whole[places[5] :])
    assert set(texts(read(str(damaged), workers=1))) == set(expected[:5])
    assert "damaged.tar: cut or damaged" in capfd.readouterr().err


def test_a_tar_without_an_end_is_said_and_read_whole(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(folder / "shards/000000.tar") as file:
        last = max(member.offset_data + -(-member.size // 512) * 512 for member in file)
    for number in range(15):
        (folder / f"open{number}.tar").write_bytes((folder / "shards/000000.tar").read_bytes()[:last])
    found = read(f"{folder}/open{{0..14}}.tar", batches=20)
    assert set(texts(found)) == set(Manifest(folder / "manifest").rows(0).captions.to_pylist())
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == len(set(errors)) > 5
    assert [line for line in errors if "has no end after byte" not in line] == []


def test_too_many_unreadable_tars_and_nothing_at_all_are_one_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"2 tars without one usable sample; .*No such file"):
        read(f"{tmp_path}/{{0..1}}.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(StreamError, match=r"1 tars without one usable .*empty\.tar: cut or damaged \(empty file\)"):
        read(f"{tmp_path}/empty.tar")
    with pytest.raises(StreamError, match=r"11 of 24 tars are cut or cannot be read, above data\.stream\.bad"):
        read(f"{tmp_path}/{{00..19}}.tar", f"{folder}/shards/{{000000..000003}}.tar", workers=1, batches=50)


class PlainHandler(Handler):
    """Answers as http.server does: whole files, without ranges; the first answer for each file breaks off."""

    def do_GET(self) -> None:  # noqa: N802
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        asked = self.headers.get("Range", "bytes=0-")
        content = Path(self.translate_path(self.path)).read_bytes()
        self.server.whole[self.path] += 1
        first = int(asked.removeprefix("bytes=").rstrip("-")) if self.server.ranged else 0
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        stop = len(content) // 2 if self.server.whole[self.path] == 1 else len(content)
        self.wfile.write(content[first:stop])
        if stop < len(content):
            self.close_connection = True
            self.connection.close()


@pytest.mark.parametrize("ranged", [True, False])
def test_a_connection_that_breaks_is_taken_up_again(
    folder: Path, server: Server, ranged: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where it broke, whether or not the server knows ranges; an answer 503 is asked for again."""
    server.RequestHandlerClass = lambda *given: PlainHandler(*given, directory=str(folder))  # type: ignore[assignment]
    server.ranged, server.failures = ranged, 2
    local = read(f"{folder}/shards/{{000000..000003}}.tar", workers=2)
    remote = read(f"{server.address}/shards/{{000000..000003}}.tar", workers=2)
    assert texts(remote) == texts(local)
    assert all(
        torch.equal(one.samples["image"], other.samples["image"]) for one, other in zip(local, remote, strict=True)
    )
    assert all(server.whole[f"/shards/00000{number}.tar"] >= 2 for number in range(4))
    said = capfd.readouterr().err.splitlines()
    assert {"trying again for 60 s" in line or ": can be read again, after " in line for line in said} == {True}


def test_a_plain_web_server_and_its_missing_tars(
    folder: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    server.RequestHandlerClass = lambda *given: Quiet(*given, directory=str(folder))  # type: ignore[assignment]
    found = read(f"{server.address}/shards/{{000003..000004}}.tar", workers=2)
    assert set(texts(found)) == set(Manifest(folder / "manifest").rows(3).captions.to_pylist())
    assert f"{server.address}/shards/000004.tar: is not there" in capfd.readouterr().err


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_object_store(folder: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in sorted((folder / "shards").glob("*.tar")):
        store.pipe_file(f"/tars/{path.name}", path.read_bytes())
    assert texts(read("memory://tars/{000000..000003}.tar")) == texts(read(f"{folder}/shards/{{000000..000003}}.tar"))


def test_s3_and_a_server_that_says_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From a real S3 server; secrets of an address are in no line."""
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    for name, value in (("ENDPOINT_URL", f"http://{host}:{port}"), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}", value)
    store = fsspec.filesystem("s3")
    store.mkdir("bucket")
    for path in sorted((folder / "shards").glob("*.tar")):
        store.put_file(str(path), f"bucket/{path.name}")
    local = texts(read(f"{folder}/shards/{{000000..000003}}.tar"))
    assert texts(read("s3://bucket/{000000..000003}.tar")) == local
    read("s3://bucket/{000003..000004}.tar")
    assert "s3://bucket/000004.tar: is not there" in capfd.readouterr().err
    moto.stop()
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://user:word@127.0.0.1:{silent.getsockname()[1]}/a.tar?secret=1"
        with pytest.raises(StreamError, match=r"http://127.*a\.tar\?\.\.\.: .*imeout.*tried \d+ times") as found:
            read(url, timeout=0.05, patience=0.3)
    assert "secret" not in str(found.value) + capfd.readouterr().err


def test_commands_run_only_where_a_setting_allows_them(folder: Path, tmp_path: Path) -> None:
    """Also not from a list, whether local or remote; webdataset's own rewriting of addresses has no effect."""
    command = f"pipe:touch {tmp_path}/ran; cat {folder}/shards/00000{{0..3}}.tar"
    listed = tmp_path / "list.txt"
    listed.write_text(f"# ours\n{folder}/shards/000000.tar\n\n{command}\n")
    fsspec.filesystem("memory").pipe_file("/list.txt", listed.read_bytes())
    for url in (command, f" {command}", str(listed), "memory://list.txt", f"{folder}/shards::{command}"):
        with pytest.raises(ConfigError, match=r"^data\.urls=.*: a command is run only with data\.stream\.pipe=true"):
            read(url)
    assert not (tmp_path / "ran").exists()
    first = read(command, pipe=True)
    assert texts(first) == texts(read(f"{folder}/shards/{{000000..000003}}.tar"))
    assert (tmp_path / "ran").exists()
    assert len(read(str(listed), pipe=True)) == 4


def test_a_command_that_fails_is_named(tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read(f"pipe:cat {folder}/shards/000000.tar; exit 3", pipe=True)
    assert "exit 3: the command ended with status 3; its other samples" in capfd.readouterr().err
    with pytest.raises(StreamError, match="exit 4: the command ended with status 4"):
        read("pipe:exit 4", pipe=True)
    # A command that goes on is ended, after its tar or with the stream.
    assert len(read(f"pipe:cat {folder}/shards/000000.tar; sleep 600", pipe=True, timeout=0.1)) == 4
    endless = WebDatasetStream(urls=["pipe:sleep 600"], seed=0, resolution=32, global_batch_size=1, pipe=True)
    threading.Timer(0.2, endless.close).start()
    with pytest.raises(StreamError, match="was closed"):
        next(iter(endless))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "empty is no address"),
        ("-", "- is no address"),
        ("s3://bucket/{0..9.tar", "Unbalanced braces"),
        ("{folder}/nothing*.tar", "no tar is there"),
        ("{folder}/manifest", "no tar is there"),
        ("{folder}/nothing.txt", "cannot be read"),
        ("nowhere://bucket/a.tar", "install fsspec's package for nowhere://"),
        ("{folder}/{0..9999999999}.tar", "more than 10,000,000 addresses"),
    ],
)
def test_an_address_that_cannot_work_is_one_line(
    folder: Path, url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^data\.urls=") as found:
        read(url.replace("{folder}", str(folder)))
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_settings_that_cannot_work_are_one_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.urls: no tar"):
        read()
    for setting, value in (
        ("pipe", "yes"),
        ("caption", 3),
        ("bad_share", 2),
        ("shuffle", 0),
        ("timeout", "soon"),
        ("timeout", 0),
    ):
        with pytest.raises(ConfigError, match=rf"data\.stream\.{setting}={value}: must be"):
            read(f"{folder}/shards", **{setting: value})
