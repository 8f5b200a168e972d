"""The real img2dataset against a real server, and what stands around it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from data_pipeline.download import DownloadError, Job, _problem, _remove_unfinished, download
from data_pipeline.index import index
from data_pipeline.picture_set import LAION_SCHEMA, write_picture_set
from data_pipeline.shapes_detector import caption_attributes, detect
from data_pipeline.sources import Columns, resolve_columns
from data_pipeline.url_list import url_problem, write_url_list
from vdtrain.compose import ConfigError
from vdtrain.data.manifest import Manifest
from vdtrain.data.stream import PairStream
from vdtrain.data_config import DownloadConfig, ShapesConfig, SourceConfig

CONFIG = DownloadConfig(
    distributor="multiprocessing",
    processes=1,
    threads=4,
    samples_per_shard=25,
    image_size=64,
    encode_quality=95,
    min_image_size=32,
    max_aspect_ratio=3.0,
    max_image_pixels=1_000_000,
    timeout=5,
    retries=0,
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A served set of 60 pictures, whose LAION table has two more rows: a local file, and a picture that is missing."""
    folder = tmp_path_factory.mktemp("pictures")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        write_picture_set(ShapesConfig(folder=str(folder), pictures=60, pixels=128, seed=0, port=port))
        table = folder / "laion2b_en.parquet"
        rows = pq.read_table(table).to_pylist()
        for url in (f"file://{folder}/images/000000.jpg", f"http://127.0.0.1:{port}/images/missing.jpg"):
            rows.append({**rows[0], "URL": url})
        pq.write_table(pa.Table.from_pylist(rows, schema=LAION_SCHEMA), table)
        yield folder
        server.shutdown()


def sources(pictures: Path, folder: Path) -> dict[str, SourceConfig]:
    return {
        name: SourceConfig(
            schema=name, metadata=str(pictures / f"{name}.parquet"), selected="", shards=str(folder / name)
        )
        for name in ("laion2b_en", "coyo700m")
    }


def test_from_metadata_to_batches(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = sources(pictures, tmp_path)
    download(wanted, CONFIG, allow_loopback=True)
    printed = capsys.readouterr().out
    assert "refused {'not http or https': 1}" in printed
    assert "laion2b_en: 36 of 37 pictures in 2 shards; failed: 1 HTTP Error 404: File not found" in printed
    assert "coyo700m: 24 of 24 pictures in 1 shards" in printed

    index({name: Path(source.shards) for name, source in wanted.items()}, tmp_path / "manifest")
    manifest = Manifest(tmp_path / "manifest")
    assert len(manifest) == 60
    assert set(manifest.shortest_side.tolist()) == {64}
    assert sum(1 for path in manifest.shards for _ in webdataset.WebDataset(str(path), shardshuffle=False)) == 60

    stream = PairStream(tmp_path / "manifest", seed=0, resolution=64, global_batch_size=20)
    for batch in islice(stream, 3):
        for picture, text in zip(batch.samples["image"], batch.samples["text"], strict=True):
            assert detect(picture.permute(1, 2, 0).numpy()) == caption_attributes(text)
    stream.close()

    # Run again: a shard that was half written is made anew, the finished ones are not touched.
    kept, lost = tmp_path / "laion2b_en" / "000000.tar", tmp_path / "laion2b_en" / "000001.tar"
    before = kept.stat().st_mtime_ns
    lost.write_bytes(lost.read_bytes()[:3000])
    lost.with_name("000001_stats.json").unlink()
    download({"laion2b_en": wanted["laion2b_en"]}, CONFIG, allow_loopback=True)
    assert kept.stat().st_mtime_ns == before
    assert sum(1 for _ in webdataset.WebDataset(str(lost), shardshuffle=False)) == 11

    with pytest.raises(ConfigError, match=r"data\.download\.samples_per_shard: changed since shards were made"):
        download(wanted, replace(CONFIG, samples_per_shard=10), allow_loopback=True)


def test_no_process_outlives_a_killed_download(pictures: Path, tmp_path: Path) -> None:
    overrides = [
        "data=shapes",
        f"data.root={tmp_path}",
        *(f"data.sources.{name}.metadata={pictures}/{name}.parquet" for name in ("laion2b_en", "coyo700m")),
    ]
    command = [sys.executable, "-m", "data_pipeline", "download", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(running(tmp_path)) >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not running(tmp_path))


def running(folder: Path) -> list[int]:
    """Processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.fsencode(folder) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_downloads_do_not_share_a_folder(pictures: Path, tmp_path: Path) -> None:
    with (tmp_path / "laion2b_en.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another download is writing there"):
            download(sources(pictures, tmp_path), CONFIG, allow_loopback=True)


def test_shards_without_a_picture_are_removed_and_reported(tmp_path: Path) -> None:
    job = Job("drawn", tmp_path, tmp_path, Columns("url", "text", ()), planned=2)
    for number, good in enumerate((3, 0)):
        reasons = {"success": good} if good else {"<urlopen error [Errno 111] Connection refused>": 3}
        (tmp_path / f"{number:06d}_stats.json").write_text(json.dumps({"successes": good, "status_dict": reasons}))
        (tmp_path / f"{number:06d}.tar").write_bytes(b"")
    problem = _problem(job)
    assert problem is not None
    assert "0 of 3 pictures in 1 shards; failed: 3 <urlopen error" in problem
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000.tar", "000000_stats.json"]
    assert "1 of 2 shards are missing" in str(_problem(job))


def test_unfinished_shards_are_removed(tmp_path: Path) -> None:
    for name in ("000000.tar", "000000.parquet", "000000_stats.json", "000001.tar", "000001.parquet"):
        (tmp_path / name).touch()
    _remove_unfinished(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000.parquet", "000000.tar", "000000_stats.json"]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("https://example.org/a.jpg", None),
        ("http://8.8.8.8/a.jpg", None),
        ("ftp://example.org/a.jpg", "not http or https"),
        ("file:///etc/hosts", "not http or https"),
        ("data:image/png;base64,AAAA", "not http or https"),
        ("http://", "not http or https"),
        ("http://[::1", "malformed URL"),
        ("http://10.1.2.3/a.jpg", "private address"),
        ("http://169.254.169.254/latest/meta-data", "private address"),
        ("http://localhost:80/a.jpg", "loopback host"),
        ("http://127.0.0.1/a.jpg", "loopback host"),
        ("http://[::1]/a.jpg", "loopback host"),
        (None, "not http or https"),
        ("", "not http or https"),
    ],
)
def test_which_addresses_are_fetched(url: str | None, problem: str | None) -> None:
    assert url_problem(url, allow_loopback=False) == problem
    assert url_problem(url, allow_loopback=True) == (None if problem == "loopback host" else problem)


def test_another_plan_is_taken_while_no_shard_is_made(pictures: Path, tmp_path: Path) -> None:
    file = pictures / "coyo700m.parquet"
    columns = resolve_columns("data.sources.x", "coyo700m", file)
    assert write_url_list(tmp_path / "urls", [file], columns, CONFIG, True, begun=False) == 24
    assert write_url_list(tmp_path / "urls", [file], columns, CONFIG, False, begun=False) == 0
    assert write_url_list(tmp_path / "urls", [file], columns, CONFIG, False, begun=True) == 0


@pytest.mark.parametrize(("url", "caption"), [("URL", "TEXT"), ("url", "caption"), ("Url", "text")])
def test_columns_are_found_in_any_case(tmp_path: Path, url: str, caption: str) -> None:
    pq.write_table(pa.table({url: ["http://x"], caption: ["x"], "SIMILARITY": [0.3]}), tmp_path / "a.parquet")
    found = resolve_columns("data.sources.x", "laion2b_en", tmp_path / "a.parquet")
    assert found == Columns(url, caption, ("SIMILARITY",))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://x"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"data\.sources\.x\.metadata: .* has no caption column \(text or caption\)"):
        resolve_columns("data.sources.x", "laion2b_en", tmp_path / "a.parquet")


def test_serving_ends_well_on_sigterm(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "data_pipeline", "serve", "data=shapes", f"data.shapes.port={port}"]
    (tmp_path / "pictures").mkdir()
    process = subprocess.Popen([*command, f"data.root={tmp_path}"])

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(answers)
    second = subprocess.run([*command, f"data.root={tmp_path}"], capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"data.shapes.port={port}: Address already in use; give another port" in second.stderr
    process.terminate()
    assert process.wait(timeout=10) == 0
