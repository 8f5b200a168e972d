"""Stores that are slow, silent, wrong or refuse: http, S3 by a local server, and a file system without asyncio."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline.index.index import index
from tests.pairs import write_pairs, write_shard
from tests.ranges import Ranges
from vdtrain.data.batch import Batch
from vdtrain.data.manifest import ManifestError
from vdtrain.data.stream import PairStream, StreamError
from vdtrain.redaction import without_secrets
from vdtrain.storage import patience
from vdtrain.storage.stores import Stores

Fault = Callable[["Faulty", bytes, int, int], None]


class Faulty(Ranges):
    """Gives the server's next answers by its `faults`."""

    server: FaultyServer

    def answer(self, content: bytes, start: int, end: int) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else Ranges.answer
        fault(self, content, start, end)

    def begin(self, code: int, length: int, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Faulty, directory=str(folder)))
        self.faults: list[Fault] = []

    @property
    def root(self) -> str:
        return f"http://me:pass@word@127.0.0.1:{self.server_address[1]}/manifest"


def short_body(handler: Faulty, content: bytes, start: int, end: int) -> None:
    handler.begin(206, end - start)
    handler.wfile.write(content[start : end - 100])
    handler.close_connection = True


def short_and_said_so(handler: Faulty, content: bytes, start: int, end: int) -> None:
    Ranges.answer(handler, content, start, end - 100)


def another_range(handler: Faulty, content: bytes, start: int, end: int) -> None:
    Ranges.answer(handler, content, start + 512, end + 512)


def whole_file(handler: Faulty, content: bytes, start: int, end: int) -> None:
    handler.begin(200, len(content))
    handler.wfile.write(content)


def web_page(handler: Faulty, content: bytes, start: int, end: int) -> None:
    page = b"<html>Please log in</html>".ljust(end - start)
    handler.begin(200, len(page), Content_Type="text/html")
    handler.wfile.write(page)


def reset(handler: Faulty, content: bytes, start: int, end: int) -> None:
    handler.begin(206, end - start)
    handler.wfile.write(content[start : start + 100])
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()


def wrong_bytes(handler: Faulty, content: bytes, start: int, end: int) -> None:
    header = content[start : start + 512]
    Ranges.answer(handler, content[:start] + header + bytes(end - start - 512) + content[end:], start, end)


def unavailable(handler: Faulty, content: bytes, start: int, end: int) -> None:
    handler.begin(503, 0, Retry_After=(datetime.now(UTC) + timedelta(seconds=1)).strftime("%a, %d %b %Y %T GMT"))


def too_many(handler: Faulty, content: bytes, start: int, end: int) -> None:
    handler.begin(429, 0, Retry_After="1")


def unauthorised(handler: Faulty, content: bytes, start: int, end: int) -> None:
    handler.send_error(401, "The token has expired")


def silent(handler: Faulty, content: bytes, start: int, end: int) -> None:
    time.sleep(1.5)


def dripping(handler: Faulty, content: bytes, start: int, end: int) -> None:
    handler.begin(206, end - start)
    for place in range(start, start + 15):
        handler.wfile.write(content[place : place + 1])
        handler.wfile.flush()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    write_pairs(folder, shards=2, count=12)
    return folder


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    with FaultyServer(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def read(folder: Path, root: str | None = None, batches: int = 3, **settings: Any) -> list[Batch]:
    stream = PairStream(
        folder / "manifest", seed=0, resolution=32, global_batch_size=8, shard_root=root, workers=1, **settings
    )
    try:
        found = list(islice(stream, batches))
        assert not stream.replaced
        return found
    finally:
        stream.close()


def same(first: list[Batch], second: list[Batch]) -> bool:
    return all(
        torch.equal(one.samples["image"], other.samples["image"]) and one.samples["text"] == other.samples["text"]
        for one, other in zip(first, second, strict=True)
    )


ONCE = [short_body, short_and_said_so, another_range, whole_file, web_page, reset, wrong_bytes, unavailable, too_many]
ONCE += [unauthorised, silent, dripping]


@pytest.mark.parametrize("fault", ONCE, ids=lambda fault: fault.__name__)
def test_one_wrong_answer_is_asked_for_again(folder: Path, server: FaultyServer, fault: Fault) -> None:
    server.faults = [Ranges.answer, fault, Ranges.answer, fault]
    began = time.monotonic()
    assert same(read(folder, server.root, timeout=0.5), read(folder))
    assert not server.faults
    if fault is too_many:
        assert time.monotonic() - began >= 1


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (silent, "no whole answer within data.stream.timeout=0.1 seconds; check that it can be reached, tried "),
        (dripping, "no whole answer within data.stream.timeout=0.1 seconds"),
        (whole_file, "; use a server that serves ranges, or, if the shard has changed, index the shards again"),
        (unauthorised, "access is refused (401, message='The token has expired', url='http://127.0.0.1"),
    ],
    ids=["silent", "dripping", "whole file", "refused"],
)
def test_a_store_that_stays_wrong_is_named_without_secrets(
    folder: Path, server: FaultyServer, fault: Fault, line: str
) -> None:
    server.faults = [fault] * 1000
    with pytest.raises(StreamError) as failure:
        read(folder, server.root, timeout=0.1, patience=0.5)
    message = str(failure.value)
    assert message.startswith(f"http://127.0.0.1:{server.server_address[1]}/shards/00000")
    assert "word" not in message
    assert line in message


def test_one_shard_that_is_not_there_is_named(folder: Path, server: FaultyServer, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "shards" / "000001.tar").unlink()
    with FaultyServer(tmp_path / "copy") as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(StreamError, match=r"/shards/000001\.tar: is not there; check data\.stream\.shard_root"):
            read(folder, other.root)
        other.shutdown()


@pytest.mark.parametrize("keep_size", [False, True])
def test_a_remote_shard_that_was_made_anew_is_not_used(folder: Path, tmp_path: Path, keep_size: bool) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    for number in range(2):
        tar = tmp_path / "copy" / "shards" / f"{number:06d}.tar"
        size = tar.stat().st_size
        write_shard(tar, 12 if keep_size else 40, seed=number + 10)
        if keep_size:
            os.truncate(tar, size)
    with FaultyServer(tmp_path / "copy") as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        for cache in (None, {"folder": str(tmp_path / "cache"), "gigabytes": 1}):
            with pytest.raises(
                StreamError, match=r"/shards/00000\d\.tar: made anew since the index.*; index the shards"
            ):
                read(folder, other.root, cache=cache)
        other.shutdown()
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_cached_copy_goes_with_the_index_and_a_damaged_one_is_fetched_again(
    server: FaultyServer, folder: Path, tmp_path: Path
) -> None:
    cache = {"folder": str(tmp_path / "cache"), "gigabytes": 1}
    expected = read(folder)
    stream = PairStream(
        folder / "manifest", seed=0, resolution=32, global_batch_size=8, shard_root=server.root, cache=cache
    )
    list(islice(stream, 3))
    for fetching in stream.reader._fetching.values():
        fetching.result(timeout=30)
    stream.close()
    copies = sorted((tmp_path / "cache").glob("*.tar"))
    assert len(copies) == 2
    copies[0].write_bytes(bytes(copies[0].stat().st_size))
    os.truncate(copies[1], 1000)
    assert same(read(folder, server.root, cache=cache), expected)
    # The shards of another index are other copies, whatever their addresses.
    write_pairs(tmp_path / "other", shards=2, count=12)
    for number in range(2):
        write_shard(tmp_path / "other" / "shards" / f"{number:06d}.tar", 12, seed=number + 20)
    index({"drawn": tmp_path / "other" / "shards"}, tmp_path / "other" / "manifest")
    own = read(tmp_path / "other")
    with FaultyServer(tmp_path / "other") as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        assert same(read(tmp_path / "other", other.root, cache=cache), own)
        other.shutdown()


class StuckFileSystem(MemoryFileSystem):
    """Waits on the server without asyncio; the second read goes on for ever."""

    protocol = "stuck"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("stuck:/")

    reads = 0
    waiting = threading.Event()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        type(self).reads += 1
        if type(self).reads == 2:
            type(self).waiting.wait()
        content: bytes = super().cat_file(path, start=start, end=end)
        return content


def test_a_file_system_without_asyncio_has_the_limit_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("stuck", StuckFileSystem, clobber=True)
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    for path in sorted((folder / "shards").glob("*.tar")):
        fsspec.filesystem("stuck").pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    assert same(read(folder, "stuck://bucket/manifest", timeout=0.3), read(folder))
    assert StuckFileSystem.reads > 2
    StuckFileSystem.waiting.set()


@pytest.mark.parametrize(("address", "package"), [("gs://b/m", "gcsfs"), ("s3://b/m", "s3fs"), ("gcs://b/m", "gcsfs")])
def test_a_missing_package_has_its_install_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, address: str, package: str
) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, address.partition(":")[0], raising=False)
    with pytest.raises(ManifestError) as failure:
        read(folder, address)
    assert str(failure.value).startswith(f"{address.removesuffix('m')}shards/000000.tar: cannot be read here (")
    assert str(failure.value).endswith("; run `pip install 'vdtrain[stores]'`")


def test_addresses_keep_no_secrets() -> None:
    for text, expected in {
        "https://h/a.tar?X-Amz-Signature=abc&b=c, 403": "https://h/a.tar?... 403",
        "GET 'http://me:p@ss@h:80/x' and s3://b/k": "GET 'http://h:80/x' and s3://b/k",
        "message='Forbidden', url='https://u@h/a?sig=1'": "message='Forbidden', url='https://h/a?...'",
        "what? me@h": "what? me@h",
    }.items():
        assert without_secrets(text) == expected


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A bucket with the shards, by an endpoint and credentials from the environment."""
    import s3fs

    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "hidden",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if not system.exists("pictures"):
        system.mkdir("pictures")
        for path in sorted((folder / "shards").glob("*.tar")):
            system.put_file(str(path), f"pictures/set/shards/{path.name}")
    yield "s3://pictures/set/manifest"
    # A file system keeps its endpoint, for the tests that follow too.
    s3fs.S3FileSystem.clear_instance_cache()


def test_shards_are_read_from_s3_with_a_cache_and_without(bucket: str, folder: Path, tmp_path: Path) -> None:
    expected = read(folder)
    assert same(read(folder, bucket), expected)
    cache = {"folder": str(tmp_path / "cache"), "gigabytes": 1}
    assert same(read(folder, bucket, cache=cache), expected)
    assert same(read(folder, bucket, cache=cache), expected)


def test_s3_by_a_profile_of_the_credentials_file(
    bucket: str, s3: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = key\naws_secret_access_key = hidden\n")
    (tmp_path / "config").write_text(f"[profile lab]\nendpoint_url = {s3}\ns3 =\n    addressing_style = path\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    s3fs.S3FileSystem.clear_instance_cache()
    assert same(read(folder, bucket), read(folder))


def test_errors_of_s3_are_named(bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    with pytest.raises(StreamError, match=r"s3://nobucket/shards/00000\d\.tar: is not there \(.*bucket does not exist"):
        read(folder, "s3://nobucket/manifest")
    with pytest.raises(StreamError, match=r"s3://pictures/else/shards/00000\d\.tar: is not there"):
        read(folder, "s3://pictures/else/manifest")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(StreamError, match=r"s3://pictures/.*; check that it can be reached, tried \d+ times"):
            read(folder, bucket, timeout=1, patience=0.5)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StreamError, match=r"access is refused \(Unable to locate credentials\), to a new session too"):
        read(folder, bucket)


@pytest.mark.parametrize("code", ["ExpiredToken", "RequestTimeTooSkewed", "InvalidAccessKeyId", "InvalidToken"])
def test_an_expired_token_gets_one_new_session(
    bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """The store knows sessions by their keys; the environment has a new key after the old one has expired."""
    import s3fs
    from botocore.exceptions import ClientError

    ask, valid = s3fs.S3FileSystem._call_s3, {"key"}

    async def checked(self: Any, method: str, *arguments: Any, **more: Any) -> Any:
        await self.set_session()
        credentials = await self.session.get_credentials()
        if credentials.access_key not in valid:
            described = {"Error": {"Code": code, "Message": "The provided token has expired."}}
            raise s3fs.errors.translate_boto_error(ClientError(described, method))
        return await ask(self, method, *arguments, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", checked)
    stream = PairStream(
        folder / "manifest", seed=0, resolution=32, global_batch_size=8, shard_root=bucket, prefetch=0, workers=1
    )
    batches = iter(stream)
    found = [next(batches)]
    valid.clear()
    valid.add("new")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "new")
    found += [next(batches)]
    assert same(found, read(folder, batches=2))
    valid.clear()
    with pytest.raises(
        StreamError, match=r"access is refused \(.*The provided token has expired\.\), to a new session"
    ):
        next(batches)
    stream.close()


def test_a_closed_store_ends_its_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 1000.0)
    waits = patience.Patience(4000.0)
    store = Stores(1.0, waits)
    threading.Timer(0.2, waits.close).start()
    with pytest.raises(StreamError, match="closed"):
        store.read("http://127.0.0.1:9/x", 0, 10)
