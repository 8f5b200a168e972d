"""The real img2dataset on each of its engines against a hostile server; killed, and run again (90 CPU-seconds)."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.download import part as download_part
from data_pipeline.download.download import check, check_environment, download, own_parts
from data_pipeline.download.part import Part
from data_pipeline.select.selection import Selection, part_file, write_selection
from data_pipeline.shards import finished
from tests.data_pipeline.hostile_server import HostileServer, hostile_server, jpeg
from tests.programs import program
from vdtrain.config.compose import ConfigError
from vdtrain.config.data_schema import DownloadConfig, SourceConfig

CONFIG = DownloadConfig(
    distributor="multiprocessing",
    processes=1,
    threads=16,
    samples_per_shard=25,
    image_size=128,
    encode_quality=95,
    min_image_size=32,
    max_aspect_ratio=3.0,
    max_image_pixels=1_000_000,
    max_bytes=1_000_000,
    timeout=3,
    retries=1,
    user_agent="Mozilla/5.0",
    min_success_share=0.3,
    retry_below=0.9,
    retry_rounds=1,
)
# What becomes of a path, or of a URL as it is.
REFUSED = {
    "/404": "HTTP Error 404: Not Found",
    "/loop": "infinite loop",
    "/to-file": "redirect to not http or https",
    "/to-ftp": "redirect to not http or https",
    "/to-private": "redirect to private address",
    "/to-metadata": "redirect to private address",
    "/silent": "timed out",
    "/drip": "slower than 9 seconds",
    "/junk": "body above 1,000,000 bytes",
    "/endless": "body above 1,000,000 bytes",
    "/bomb.png": "CV_IO_MAX_IMAGE_PIXELS",
    "/truncated.jpg": "Image decoding error",
    "/page.html": "Image decoding error",
    "/drawing.svg": "Image decoding error",
    "/nothing.jpg": "buf.empty()",
    "/pixel.png": "image too small",
    "/thin.jpg": "aspect ratio too large",
    "/noai.jpg": "opted out: X-Robots-Tag noai",
    "/noimageai.jpg": "opted out: X-Robots-Tag noimageai",
    "/noindex.jpg": "opted out: X-Robots-Tag noindex",
    "/noml.jpg": "opted out: X-Robots-Tag noml",
    "/tdm.jpg": "opted out: TDM-Reservation",
    "file:///etc/hostname": "not http or https",
    "ftp://127.0.0.1/a.jpg": "not http or https",
    "http://10.0.0.1/a.jpg": "private address",
    "http://169.254.169.254/latest/meta-data/": "private address",
    "": "not http or https",
    "/500": "HTTP Error 500: Internal Server Error",
    "/short.jpg": "IncompleteRead",
}
TAKEN = (
    *("/moved.jpg", "/flaky.jpg", "/googlebot.jpg", "/tdm0.jpg", "/large.jpg", "/sideways.jpg"),
    "/recovering.jpg",  # the last row of the last shard
)
GOOD = 25
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    with hostile_server() as running:
        yield running


def source(folder: Path, *parts: Sequence[str]) -> SourceConfig:
    """A source whose parts hold these URLs, as `select` leaves it."""
    config = SourceConfig("table", "", str(folder / "selected"), str(folder / "shards"))
    selected = Path(config.selected)
    selected.mkdir(parents=True, exist_ok=True)
    for number, urls in enumerate(parts):
        columns = {
            "uid": [f"{number:08x}{row:024x}" for row in range(len(urls))],
            "url": urls,
            "caption": [f"a caption for {url}" for url in urls],
            "similarity": [0.25] * len(urls),
        }
        pq.write_table(pa.table(columns), part_file(selected, number))
    rows = sum(map(len, parts))
    write_selection(selected, Selection("", {}, rows, rows, len(parts), max(map(len, parts), default=1), {}, {}))
    return config


def attempts(config: SourceConfig) -> Rows:
    """Every row that img2dataset has a result for, by URL."""
    return {
        row["url"]: row for file in Path(config.shards).rglob("*.parquet") for row in pq.read_table(file).to_pylist()
    }


def stored(config: SourceConfig) -> dict[str, tuple[bytes, str, dict[str, Any]]]:
    """Image, caption and metadata of every sample, by URL."""
    found = {}
    for path in Path(config.shards).rglob("*.tar"):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, content in members.items():
            if name.endswith(".json"):
                key, about = name.removesuffix(".json"), json.loads(content)
                found[about["url"]] = (members[key + ".jpg"], members[key + ".txt"].decode(), about)
    return found


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let img2dataset and its workers be forks, which OpenCV's limits and the search for processes do not reach."""
    monkeypatch.setattr(sys, "executable", program("python"))


@pytest.fixture(scope="module")
def web(server: HostileServer, tmp_path_factory: pytest.TempPathFactory) -> SourceConfig:
    """A downloaded source: a shard of good images and two of everything else, the last of which is tried again."""
    urls = [
        *(f"{server.base}/good/{number}.jpg" for number in range(GOOD)),
        *(server.base + path if path.startswith("/") else path for path in [*TAKEN[:-1], *REFUSED, TAKEN[-1]]),
    ]
    config = source(tmp_path_factory.mktemp("web"), urls)
    download({"web": config}, CONFIG, allow_loopback=True)
    return config


@pytest.mark.parametrize(("path", "message"), REFUSED.items())
def test_what_is_refused_by_name(web: SourceConfig, server: HostileServer, path: str, message: str) -> None:
    row = attempts(web)[server.base + path if path.startswith("/") else path]
    assert row["status"].startswith("failed")
    assert message in row["error_message"]
    assert row["url"] not in stored(web)


def test_what_is_taken_is_taken_whole(web: SourceConfig, server: HostileServer) -> None:
    images = stored(web)
    assert len(images) == GOOD + len(TAKEN)
    for number in range(GOOD):
        url = f"{server.base}/good/{number}.jpg"
        image, caption, about = images[url]
        assert image == jpeg(number)
        assert caption == f"a caption for {url}"
        assert (about["uid"], about["similarity"]) == (f"{0:08x}{number:024x}", 0.25)
    large, _, about = images[server.base + "/large.jpg"]
    assert Image.open(io.BytesIO(large)).size == (160, 128)
    assert (about["original_width"], about["original_height"]) == (200, 160)
    assert json.loads(images[server.base + "/sideways.jpg"][2]["exif"])["Image Orientation"] == "Rotated 90 CW"


def test_a_low_shard_is_tried_again_once(web: SourceConfig, server: HostileServer) -> None:
    """Every round asks twice for what may pass; the other shards are left as they are."""
    assert server.requests["/recovering.jpg"] == 3
    assert server.requests["/500"] == 4
    assert server.requests["/silent"] == 2
    assert server.requests["/drip"] == server.requests["/404"] == server.requests["/good/1.jpg"] == 1
    record = json.loads(Path(web.shards, "00000.plan.json").read_text())
    assert record["rounds"] == 1
    assert record["outcome"]["reasons"]["success"] == GOOD + len(TAKEN)
    assert not list(Path(web.shards).rglob("*.before"))


def test_what_is_done_is_not_done_again(
    web: SourceConfig, server: HostileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = server.requests.total()
    download({"web": web}, CONFIG, allow_loopback=True)
    assert server.requests.total() == asked
    printed = capsys.readouterr().out
    assert f"web: {GOOD + len(TAKEN)} of {GOOD + len(TAKEN) + len(REFUSED)} images" in printed
    assert "address refused" in printed
    assert "in 3 shards" in printed
    with pytest.raises(
        ConfigError, match=r"data\.download\.samples_per_shard: changed since the shards in .* were mad"
    ):
        download({"web": web}, replace(CONFIG, samples_per_shard=10), allow_loopback=True)
    selected = part_file(Path(web.selected), 0)
    whole = selected.read_bytes()
    pq.write_table(pq.read_table(selected).slice(1), selected)
    with pytest.raises(ConfigError, match=r"data\.sources\.web\.selected: changed since"):
        download({"web": web}, CONFIG, allow_loopback=True)
    selected.write_bytes(whole)


ODD = (
    *("/good/caf\u00e9 {}.jpg", "/good/{}.jpg?\u00fc=\u65e5\u672c", "\\good\\{}.jpg#top", "/good/%C3%A9{}.jpg\n"),
    *("/x/../good/\u00e9%20{}.jpg", "/good/%{}.jpg?a=1&amp;b='<>'", "/to-utf8?{}", "/encoded/br?{}"),
)


def test_odd_addresses_from_a_table_to_shards(
    server: HostileServer, forked: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they are published, through both commands: every picture arrives, under the URL that was published."""
    base = server.base.replace("http", "HTTP")
    urls = [f" {base}{ODD[number % len(ODD)].format(number)}\u200b" for number in range(56)]
    pq.write_table(pa.table({"URL": urls, "TEXT": ["a cat"] * len(urls)}), tmp_path / "odd.parquet")
    settings = ["data=shapes", f"data.root={tmp_path}", "~data.sources.coyo700m"]
    settings += [f"data.sources.laion2b_en.metadata={tmp_path}/odd.parquet", "data.download.min_success_share=0"]
    assert main(["select", *settings]) == 0
    assert main(["download", *settings]) == 0
    assert "laion2b_en: 56 of 56 images (100%)" in capsys.readouterr().out
    assert set(stored(SourceConfig("table", "", "", f"{tmp_path}/shards"))) == set(urls)


@pytest.mark.slow
@pytest.mark.parametrize("distributor", ["pyspark", "ray"])
def test_other_engines(server: HostileServer, tmp_path: Path, distributor: str) -> None:
    if not available(distributor):
        pytest.skip(f"needs {distributor}, of the extra `distributed`, and Java for pyspark")
    urls = [*(f"{server.base}/good/{number}.jpg" for number in range(30)), server.base + "/to-private"]
    config = source(tmp_path, urls)
    download({"web": config}, replace(CONFIG, distributor=distributor), allow_loopback=True)
    assert len(finished(Path(config.shards, "00000"))) == 2
    assert len(stored(config)) == 30
    assert attempts(config)[urls[-1]]["error_message"] == "redirect to private address"
    assert not running(tmp_path)


@pytest.mark.slow
def test_killed_at_three_points(server: HostileServer, tmp_path: Path) -> None:
    """In the first shard, in the second, and a worker alone; on three engines of another environment."""
    python = other_interpreter(tmp_path / "environment", complete=True)
    urls = [*(f"{server.base}/good/{number}.jpg" for number in range(25)), f"{server.base}/held/25.jpg"]
    config = source(tmp_path, [f"{server.base}/held/24.jpg", *urls[1:]])
    shards = Path(config.shards, "00000")
    spark, ray, processes = (
        cli(tmp_path, config, replace(CONFIG, python=python, timeout=30, distributor=engine))
        for engine in [*(e if available(e) else "multiprocessing" for e in ("pyspark", "ray")), "multiprocessing"]
    )

    server.released.clear()
    server.requests.clear()
    # The first shard cannot be finished.
    kill_when(spark, lambda: server.requests["/held/24.jpg"] > 0, tmp_path)
    assert not finished(shards)
    # It is, and the second cannot.
    source(tmp_path, urls)
    kill_when(ray, lambda: len(finished(shards)) == 1 and server.requests["/held/25.jpg"] > 0, tmp_path)

    server.requests.clear()
    process = subprocess.Popen(processes)
    wait_for(lambda: server.requests["/held/25.jpg"] > 0)
    found = running(tmp_path)
    assert all(python in arguments for arguments in found.values() if "img2dataset_run" in arguments)
    worker = next(process for process, arguments in found.items() if "spawn_main" in arguments)
    os.kill(worker, signal.SIGKILL)
    server.released.set()
    assert process.wait(timeout=120) == 0
    assert not running(tmp_path)
    assert {url: image for url, (image, _, _) in stored(config).items()} == {
        url: jpeg(number) for number, url in enumerate(urls)
    }
    assert server.requests["/good/0.jpg"] == 0


def test_a_run_that_stands_still_is_started_again(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [f"{server.base}/held/{number}.jpg" for number in range(2)]
    config = source(tmp_path, urls)
    server.released.clear()
    server.requests.clear()

    def stop_the_worker() -> None:
        wait_for(lambda: server.requests["/held/0.jpg"] > 0)
        worker = next(process for process, arguments in running(tmp_path).items() if "spawn_main" in arguments)
        os.kill(worker, signal.SIGSTOP)
        server.released.set()
        with monkeypatch.context() as impatient:
            impatient.setattr(download_part, "STALL_TIMEOUTS", 0.5)
            wait_for(lambda: worker not in running(tmp_path))

    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(stop_the_worker)
        download({"web": config}, replace(CONFIG, timeout=8), allow_loopback=True)
        stopped.result()
    assert server.requests["/held/0.jpg"] == 2
    assert set(stored(config)) == set(urls)
    assert not running(tmp_path)


def test_a_server_that_is_away(server: HostileServer, forked: None, tmp_path: Path) -> None:
    config = source(tmp_path, [f"{server.base}/good/{number}.jpg" for number in range(5)])
    server.away.set()
    with pytest.raises(ConfigError, match=r"0 of 5 images \(0%\); failed: 5 HTTP 503, fewer than .*; see that"):
        download({"web": config}, CONFIG, allow_loopback=True)
    server.away.clear()
    assert not finished(Path(config.shards, "00000"))
    assert not running(tmp_path)


def available(engine: str) -> bool:
    return find_spec(engine) is not None and (engine != "pyspark" or shutil.which("java") is not None)


def cli(folder: Path, config: SourceConfig, settings: DownloadConfig) -> list[str]:
    """The command that downloads one source, and another one of which nothing was selected."""
    given = {field.name: getattr(settings, field.name) for field in fields(DownloadConfig)}
    sources = {"laion2b_en": config, "coyo700m": source(folder / "nothing")}
    return [
        *(sys.executable, "-m", "data_pipeline", "download", "data=shapes"),
        *(f"data.sources.{name}.selected={each.selected}" for name, each in sources.items()),
        *(f"data.sources.{name}.shards={each.shards}" for name, each in sources.items()),
        *(f"data.download.{name}={'null' if value is None else value}" for name, value in given.items()),
    ]


def kill_when(command: list[str], condition: Callable[[], bool], folder: Path) -> None:
    """Run a command until a condition holds, kill it, and see that nothing of it goes on."""
    process = subprocess.Popen(command)
    wait_for(lambda: condition() or process.poll() is not None)
    assert process.returncode is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not running(folder))


def running(folder: Path) -> dict[int, str]:
    """Command lines of the processes that name a folder in their command line or environment, and of their children."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            named = os.fsencode(folder) in Path(f"/proc/{process.pid}/cmdline").read_bytes()
            named = named or os.fsencode(folder) in Path(f"/proc/{process.pid}/environ").read_bytes()
            if named and process.pid != os.getpid():
                for each in (process, *process.children(recursive=True)):
                    found[each.pid] = " ".join(each.cmdline())
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def other_interpreter(folder: Path, complete: bool) -> str:
    """Another environment's interpreter, with the packages of this one or none."""
    venv.create(folder, with_pip=False, symlinks=True)
    if complete:
        (place,) = folder.glob("lib/python*/site-packages")
        (place / "packages.pth").write_text(f"{Path(pa.__file__).parents[1]}\n")
    return str(folder / "bin" / "python")


def test_no_code_beside_the_shards_runs(server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shards = source(tmp_path, [server.base + "/good/1.jpg"]), tmp_path / "shards"
    for place in (shards, shards / ".modules", shards / "00000", tmp_path):
        place.mkdir(exist_ok=True)
        for name in ("sitecustomize", "usercustomize", "img2dataset", "json", "data_pipeline", "vdtrain"):
            (place / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write({name!r})")
    monkeypatch.chdir(shards)
    before = set(tmp_path.rglob("*"))
    download({"web": config}, CONFIG, allow_loopback=True)
    assert len(stored(config)) == 1
    assert not (tmp_path / "ran").exists()
    new = {path.name for path in {*tmp_path.rglob("*")} - before}
    shard = {"000000.tar", "000000.parquet", "000000_stats.json"}
    assert new == {*shard, "00000.plan.json", "00000.lock", "00000.log"}


def test_two_downloads_do_not_share_a_part(tmp_path: Path) -> None:
    config = source(tmp_path, ["http://127.0.0.1:1/a.jpg"])
    Path(config.shards).mkdir()
    part = Part.of("web", part_file(Path(config.selected), 0), Path(config.shards), 25)
    with part.beside(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"1 on {os.uname().nodename}")
        file.flush()
        with pytest.raises(ConfigError, match=r"another download is writing there \(process 1 on"):
            download({"web": config}, CONFIG, allow_loopback=True)


def test_an_environment_without_the_packages(tmp_path: Path) -> None:
    python = other_interpreter(tmp_path, complete=False)
    with pytest.raises(ConfigError, match=r"distributor=ray: \S+ lacks img2dataset ray; install it"):
        check_environment(replace(CONFIG, python=python, distributor="ray"))
    with pytest.raises(ConfigError, match=r"data\.download\.python=/nowhere: cannot be run"):
        check_environment(replace(CONFIG, python="/nowhere"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distributor": "dask"}, "distributor=dask: choose from multiprocessing, pyspark, ray"),
        ({"threads": 0}, "threads=0: must be at least 1"),
        ({"retry_below": 1.5}, "retry_below=1.5: must be from 0 to 1"),
        ({"task": 2, "tasks": 2}, "task=2: tasks count from 0 to 1"),
        ({"cluster": "spark://a:7077"}, "cluster=spark://a:7077: multiprocessing has none"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(replace(CONFIG, **settings))


def test_parts_of_tasks(tmp_path: Path) -> None:
    """Every part of every source belongs to one task."""
    sources = {"a": source(tmp_path / "a", ["x"], ["y"], ["z"]), "b": source(tmp_path / "b", ["x"] * 60, ["y"])}

    def mine(**settings: Any) -> list[tuple[str, int]]:
        return [(p.source, p.number) for own in own_parts(sources, replace(CONFIG, **settings)).values() for p in own]

    assert mine() == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert mine(task=0, tasks=2) == [("a", 0), ("a", 2), ("b", 1)]
    assert mine(task=1, tasks=2) == [("a", 1), ("b", 0)]
    assert mine(parts=[1, 2]) == [("a", 1), ("a", 2), ("b", 1)]
    assert [part.planned for part in own_parts(sources, CONFIG)["b"]] == [3, 1]
    with pytest.raises(ConfigError, match=r"parts=\[3\]: there are parts 0 to 2"):
        mine(parts=[3])
    Path(sources["b"].selected, "selection.json").unlink()
    with pytest.raises(
        ConfigError, match=r"data\.sources\.b\.selected=.*no selection.json there; run `python -m data_p"
    ):
        mine()
