"""Shards on servers and in object stores: ranges, retries, whole copies in a cache, and errors."""

from __future__ import annotations

import fcntl
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from tests.pairs import write_pairs
from tests.ranges import Ranges
from vdtrain.data import shards
from vdtrain.data.batch import Batch
from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.data.shards import ShardCache, ShardReader, StreamError
from vdtrain.data.stream import PairStream
from vdtrain.storage import patience


class Server(ThreadingHTTPServer):
    """Serves a folder, with ranges.

    Attributes:
        whole, ranges: requests by path.
        failures: number of next answers that are a 503.
        ranged: whether the server answers requests for ranges.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), partial(Handler, directory=str(folder)))
        self.whole: Counter[str] = Counter()
        self.ranges: Counter[str] = Counter()
        self.failures, self.ranged = 0, True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(Ranges):
    server: Server

    def do_GET(self) -> None:  # noqa: N802
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
        elif self.asked() is None or not self.server.ranged:
            self.server.whole[self.path] += 1
            SimpleHTTPRequestHandler.do_GET(self)
        else:
            self.server.ranges[self.path] += 1
            super().do_GET()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    write_pairs(folder, shards=3, count=12)
    return folder


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def read(folder: Path, batches: int = 4, **settings: Any) -> list[Batch]:
    stream = PairStream(folder / "manifest", seed=0, resolution=32, global_batch_size=9, **settings)
    try:
        return list(islice(stream, batches))
    finally:
        stream.close()


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(one.samples["image"], other.samples["image"]) and one.samples["text"] == other.samples["text"]
        for one, other in zip(first, second, strict=True)
    )


def test_a_web_server_gives_the_same_batches_as_a_folder(folder: Path, server: Server) -> None:
    assert same(read(folder, shard_root=f"{server.address}/manifest"), read(folder))
    assert sum(server.ranges.values()) >= 36
    assert not server.whole


def test_an_object_store_gives_the_same_batches_as_a_folder(folder: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in sorted((folder / "shards").glob("*.tar")):
        store.pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    assert same(read(folder, shard_root="memory://bucket/manifest"), read(folder))


def test_failing_answers_are_asked_for_again(folder: Path, server: Server) -> None:
    server.failures = 3
    assert same(read(folder, shard_root=f"{server.address}/manifest"), read(folder))


def test_a_server_that_keeps_failing_is_named(folder: Path, server: Server) -> None:
    server.failures = 10**6
    with pytest.raises(StreamError, match=rf"{server.address}/shards/00000\d.tar: .*503.*tried \d+ times"):
        read(folder, shard_root=f"{server.address}/manifest", patience=0.3)


def test_a_server_without_ranges_is_named(folder: Path, server: Server) -> None:
    server.ranged = False
    with pytest.raises(StreamError, match="use a server that serves ranges"):
        read(folder, shard_root=f"{server.address}/manifest")


def test_a_shard_that_is_not_there_is_named_at_once(folder: Path, server: Server) -> None:
    with pytest.raises(StreamError, match=r"/elsewhere/shards/00000\d.tar: is not there"):
        read(folder, shard_root=f"{server.address}/elsewhere/manifest")


def test_an_unknown_kind_of_address_is_named_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(ManifestError, match=r"install fsspec's package for nowhere://"):
        PairStream(
            folder / "manifest", seed=0, resolution=32, global_batch_size=9, shard_root="nowhere://bucket/manifest"
        )


def fetch_all(folder: Path, root: str, cache: ShardCache) -> ShardReader:
    """A reader that has read from every shard and has finished their copies."""
    manifest = Manifest(folder / "manifest", root)
    reader = ShardReader(manifest, cache)
    for shard in range(3):
        reader.read(shard, 0, 512)
    for fetch in reader._fetching.values():
        fetch.result(timeout=60)
    return reader


def test_a_cache_fetches_each_shard_once_and_reads_it_from_the_disk(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    root = f"{server.address}/manifest"
    reader = fetch_all(folder, root, ShardCache(str(tmp_path), 1))
    # The first 512 bytes, and the whole shard in one piece.
    assert server.ranges == {f"/shards/{number:06d}.tar": 2 for number in range(3)}
    asked = server.ranges.total()
    manifest = Manifest(folder / "manifest")
    for shard in range(3):
        content = Path(manifest.shards[shard]).read_bytes()
        assert reader.read(shard, 1024, 2000) == content[1024:3024]
    reader.close()
    assert same(read(folder, shard_root=root, cache={"folder": str(tmp_path), "gigabytes": 1}), read(folder))
    assert server.ranges.total() == asked
    assert not server.whole


def test_the_cache_stays_within_its_bound_and_drops_the_oldest(folder: Path, server: Server, tmp_path: Path) -> None:
    sizes = Manifest(folder / "manifest").bytes
    cache = ShardCache(str(tmp_path), (int(sizes.max()) + int(sizes.min()) // 2) / 1e9)
    reader = fetch_all(folder, f"{server.address}/manifest", cache)
    kept = list(tmp_path.glob("*.tar"))
    assert len(kept) == 1
    assert sum(path.stat().st_size for path in kept) <= cache.limit_bytes
    assert {path.stem for path in tmp_path.glob("*.lock")} == {kept[0].stem, "drop"}
    # Ranges serve a dropped shard again, until it is fetched again.
    for shard in range(3):
        assert len(reader.read(shard, 0, 512)) == 512
    reader.close()


def test_a_cache_too_small_for_a_shard_is_refused(folder: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"data\.stream\.cache\.gigabytes=1e-06: a shard has"):
        read(folder, shard_root=f"{server.address}/manifest", cache={"folder": str(tmp_path), "gigabytes": 1e-6})


def test_two_processes_do_not_fetch_the_same_shard(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 1)
    with cache._path("0" * 64).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.fetch("a.tar", "0" * 64, (pytest.fail("another process is about it") for _ in range(1)))


def test_a_copy_that_is_not_the_manifests_shard_is_not_kept(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 1)
    with pytest.raises(StreamError, match=r"a\.tar: made anew since the index"):
        cache.fetch("a.tar", "0" * 64, [b"else"])
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_more_shards_than_open_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_FILES", 1)
    assert same(read(folder, workers=3), read(folder))


def open_in(folder: Path) -> int:
    """Number of this process's open files in a folder."""
    count = 0
    for link in os.listdir("/proc/self/fd"):
        # Another thread may close it now.
        with suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{link}").startswith(str(folder))
    return count


def test_open_files_are_bounded_for_all_threads_together(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / str(number)).write_bytes(str(number).encode())
    files = shards.OpenFiles(4)

    def read_all(seed: int) -> bool:
        for number in np.random.default_rng(seed).permutation(40).tolist():
            with files.borrow(str(tmp_path / str(number))) as descriptor:
                # Eight files in use at most, and four that stay open.
                if open_in(tmp_path) > 12 or os.pread(descriptor, 9, 0) != str(number).encode():
                    return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read_all, range(16)))
    files.close()
    assert open_in(tmp_path) == 0
