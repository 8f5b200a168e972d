"""`data.stream=webdataset` as typed: training from a web server on two ranks, and the commands that need an index."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.pairs import write_pairs
from tests.settings import TINY, phases
from tests.training.forks import Case, run_cases
from vdtrain.cli import main
from vdtrain.tracking.metrics import read_metrics

BATCH, FIRST, STEPS = 8, 2, 4
WEB = "data.stream=webdataset"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def settings(folder: Path, urls: str, steps: int) -> list[str]:
    return [
        *TINY,
        f"stage.global_batch_size={BATCH}",
        f"hardware.micro_batch_size={{32:{BATCH}}}",
        phases(BATCH, (32, steps)),
        "optimizer.warmup_samples=0",
        "log_every_steps=1",
        f"data.manifest={folder}/none",
        f"run_dir={folder}/run",
        WEB,
        f"data.urls={urls}",
    ]


def test_a_stage_from_a_web_server_on_two_ranks_from_start_over_resume_to_end(tmp_path: Path) -> None:
    """Without an index. A tar that is not there costs a line; a third run takes the stream of an index."""
    write_pairs(tmp_path / "data", shards=3, count=10)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "data/shards"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = f"http://127.0.0.1:{server.server_address[1]}/{{000000..000003}}.tar"
        indexed = [*settings(tmp_path, urls, STEPS + 1)[:-3], f"run_dir={tmp_path}/run"]
        indexed += [f"data.manifest={tmp_path}/data/manifest"]
        endings = run_cases(
            tmp_path / "cases",
            [Case(2, settings(tmp_path, urls, steps)) for steps in (FIRST, STEPS)] + [Case(2, indexed)],
        )
        server.shutdown()
    first, resumed, last = endings
    assert [ending.statuses for ending in endings] == [[0, 0]] * 3, "\n".join(map(str, endings))
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 2))
    for ending in (first, resumed):
        (text, other) = ending.logs
        assert text.count("warning: data.stream=webdataset: no index is read.") == 1
        assert text.count("data.urls: 4 tars for 2 processes x hardware.loader_workers=") <= 1
        assert "no index is read" not in other
    assert any("000003.tar: is not there" in text for text in first.logs)
    assert "data.stream._target_=vdtrain.data.stream.PairStream: was vdtrain.data.webdataset_stream" in last.logs[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    write_pairs(folder / "data", shards=2, count=10)
    return folder


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(words)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_preflight(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what the stream promises, opens a few tars, and needs no manifest."""
    urls = f"{folder}/data/shards/{{000000..000001}}.tar"
    status, out, err = printed(capsys, "preflight", *settings(folder, urls, STEPS), "ranks=4")
    assert (status, err) == (0, "")
    assert "warning: data.stream=webdataset: no index is read." in out
    assert "warning: data.urls: 2 tars for 4 processes x hardware.loader_workers=" in out
    assert "manifest" not in out
    gone = f"{folder}/data/shards/{{000000..000004}}.tar"
    status, _, err = printed(capsys, "preflight", *settings(folder, gone, STEPS), "ranks=1")
    assert status == 2
    assert err.splitlines() == [
        f"error: {folder}/data/shards/{number}.tar: cannot be read (No such file or directory); see that it can be read"
        for number in ("000002", "000004")
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "data.urls=[]"], "data.urls: no tar; give addresses such as s3://bucket/{00000..00999}.tar"),
        (["train", "data.urls=pipe:cat x.tar"], "a command is run only with data.stream.pipe=true"),
        (["train", "data.stream.shuffle=0"], "data.stream.shuffle=0: must be at least 1"),
        (["train", "data.stream.lanes=2"], "data.stream.lanes=2: data.stream has no 'lanes'"),
        (["train", "+data.stream.weights={drawn: 1}"], "data.stream.weights: vdtrain.data.webdataset_stream"),
        (["train", "data.latents=cached"], "has no index, which data.latents=cached needs; index the shards"),
        (["train", "data.stream=indexed"], "only data.stream=webdataset reads it; add that, or leave it out"),
        (["data", "latents"], "has no index, which cached latents belong to"),
        (["evaluate", "tiny"], "has no index, which evaluation needs for pairs in a fixed order; index the shards"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(
    folder: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *own = words
    urls = f"{folder}/data/shards"
    if command == "train":
        given = [*settings(folder, urls, STEPS), *own]
    else:
        given = [*own, "data=shapes", WEB, f"data.urls={urls}", *(["model=tiny", "hardware=cpu"] * (command == "data"))]
    status, out, err = printed(capsys, command, *given)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert line in err
