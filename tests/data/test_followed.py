"""Paths in a stranger's manifest: what they may lead to, and what stands where a shard is expected."""

from __future__ import annotations

import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from tests.data.test_remote_shards import Server
from tests.pairs import write_pairs
from tests.programs import program
from tests.settings import TINY, phases
from vdtrain.data.manifest import ManifestError, read_shards, write_shards
from vdtrain.data.stream import PairStream, StreamError
from vdtrain.data.webdataset_stream import WebDatasetStream
from vdtrain.errors import ConfigError
from vdtrain.media import read_images
from vdtrain.storage.stores import leading_away


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path, shards=2, count=12)
    return tmp_path


def name_shard(folder: Path, path: str) -> None:
    """Write another path of the first shard into a manifest, as a stranger can."""
    table = read_shards(folder / "manifest")
    paths = pa.array([path, *table["path"].to_pylist()[1:]])
    write_shards(folder / "manifest", table.set_column(table.schema.get_field_index("path"), "path", paths))


def read(folder: Path, **settings: Any) -> int:
    stream = PairStream(folder / "manifest", seed=0, resolution=32, global_batch_size=8, **settings)
    try:
        return len(list(islice(stream, 3)))
    finally:
        stream.close()


@pytest.mark.parametrize(
    ("path", "follow", "problem"),
    [
        ("../../../../../../etc/passwd", (), "no .tar"),
        ("/etc/passwd", ("file",), "no .tar"),
        ("/mnt/other/0.tar", (), "absolute path"),
        ("/work/set/../../mnt/0.tar", (), "absolute path"),
        ("file:///etc/0.tar", (), "follow=[file]"),
        ("http://host.invalid/0.tar", (), "follow=[http]"),
        ("http://host.invalid/0.tar", ("s3",), "follow=[s3,http]"),
        ("s3://bucket/0.tar", ("http",), "follow=[http,s3]"),
        ("simplecache::http://host/0.tar", ("http",), "address"),
        ("HTTP://host/0.tar", ("http",), "address"),
        ("http://169.254.169.254/latest/0.tar", ("http",), "link-local"),
        ("http://[fe80::1]/0.tar", ("http",), "link-local"),
        ("http://[::ffff:169.254.169.254]/0.tar", ("http",), "link-local"),
        ("http://2852039166/0.tar", ("http",), "link-local"),
        ("http://0xa9.0xfe.0xa9.0xfe:80/0.tar", ("http",), "link-local"),
        ("http://me:word@169.254.1.1/0.tar", ("http",), "link-local"),
        ("http://[fd00:ec2::254]/0.tar", ("http",), "link-local"),
        ("../shards/0.tar", (), None),
        ("../../../disk/a b.TAR", (), None),
        ("/work/set/shards/0.tar", (), None),
        ("/mnt/other/0.tar", ("file",), None),
        ("http://127.0.0.1:80/0.tar?x=1", ("http",), None),
        ("s3://bucket/0.tar", ("s3",), None),
    ],
)
def test_what_a_path_may_lead_to(path: str, follow: tuple[str, ...], problem: str | None) -> None:
    found = leading_away(["a.tar", path], "/work/set", follow)
    assert found is None if problem is None else problem in str(found)
    assert "word" not in str(found)


def test_an_address_in_a_manifest_is_read_if_a_setting_allows_its_kind(folder: Path) -> None:
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        name_shard(folder, f"{server.address}/shards/000000.tar")
        with pytest.raises(ManifestError, match=r"shards\.parquet names the address http://\S+/000000\.tar; give "):
            read(folder)
        assert read(folder, follow=["http"]) == 3
        server.shutdown()


@pytest.mark.parametrize("location", ["http://169.254.169.254/0.tar", "//[fe80::1]/latest/0.tar?key=word"])
def test_no_server_leads_a_read_to_a_link_local_address(folder: Path, location: str) -> None:
    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

    with ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        name_shard(folder, f"http://127.0.0.1:{server.server_address[1]}/shards/000000.tar")
        with pytest.raises(StreamError, match=r"leads to the link-local address \S+0\.tar") as refused:
            read(folder, follow=["http"])
        assert "word" not in str(refused.value)
        own = [f"data.manifest={folder}/manifest", f"run_dir={folder}/run", "data.stream.follow=[http]"]
        own += ["stage.init_from=null", "stage.global_batch_size=8", "hardware.micro_batch_size={32:8}"]
        words = ["train", "stage=stage1_single_flow", *TINY, phases(8, (32, 2)), *own]
        trained = subprocess.run([program("vdtrain"), *words], capture_output=True, text=True, timeout=300)
        server.shutdown()
    assert trained.returncode == 1
    (line,) = [line for line in trained.stderr.splitlines() if line.startswith("error: ")]
    assert "leads to the link-local address" in line
    assert "word" not in trained.stdout + trained.stderr


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_does_not_hang_a_loader(folder: Path, kind: str) -> None:
    for shard in (folder / "shards").rglob("*.tar"):
        shard.unlink()
        os.mkfifo(shard) if kind == "pipe" else shard.symlink_to("/dev/zero")
    with pytest.raises(StreamError, match=r"000000\.tar: cannot be read \(not a regular file\)|not a regular file"):
        read(folder)
    with pytest.raises((StreamError, ConfigError), match="not a regular file"):
        list(
            islice(
                WebDatasetStream(
                    urls=[str(shard) for shard in (folder / "shards").rglob("*.tar")],
                    seed=0,
                    resolution=32,
                    global_batch_size=8,
                ),
                1,
            )
        )


def test_a_pipe_or_another_format_is_no_picture_for_sample(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", format="TIFF")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "c.png")
    for name, said in {"a.png": "not a regular file", "b.png": "give a file of", "c.png": "pixels"}.items():
        with pytest.raises(ConfigError, match=said):
            read_images([str(tmp_path / name)], (8, 8))
