"""Progress as it is read in a log and on a terminal (a second)."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from tests.settings import own_time
from vdtrain.progress import Progress, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("vdtrain.progress.time", own_time(monotonic=lambda: now[0]))
    return now


def test_a_log_gets_a_line_every_half_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """The rate leaves out what an earlier run did."""
    with Progress("download", 1000, "images") as progress:
        progress.skip(200)
        for seconds, images in ((1, 210), (10, 260), (31, 300), (40, 400), (61, 410)):
            clock[0] = 100.0 + seconds
            progress.note = f"50% fetched, failed: {images // 2} HTTP 404"
            progress.show(images)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        "download: 300 of 1,000 images, 3.2 images/s, 0:03:37 left; 50% fetched, failed: 150 HTTP 404\n"
        "download: 410 of 1,000 images, 3.4 images/s, 0:02:51 left; 50% fetched, failed: 205 HTTP 404\n"
    )


def test_figures_of_a_line(clock: list[float]) -> None:
    progress = Progress("index", 768_000, "MB")
    clock[0] += 4
    assert progress.line() == "0 of 768,000 MB, 0.000 MB/s, unknown time left"
    progress.advance(7_680)
    assert progress.line() == "7,680 of 768,000 MB, 1,920 MB/s, 0:06:36 left"
    progress.total = None
    assert progress.line() == "7,680 MB, 1,920 MB/s"


@pytest.mark.parametrize("silent", [False, True])
def test_short_or_silent_work_shows_nothing(
    clock: list[float], capsys: pytest.CaptureFixture[str], silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vdtrain.progress.LINE_SECONDS", 0.0)
    with Progress("work", 2, "steps", silent=silent) as progress:
        clock[0] += 1.9
        progress.advance()
        assert capsys.readouterr().err == ""
        clock[0] += 1
        progress.advance()
    assert (capsys.readouterr().err == "") == silent


def test_items_are_counted(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(["a", "b"], "draw", "images"):
        clock[0] += 40
    for _ in track(iter("ab"), "draw", "letters"):
        clock[0] += 40
    for _ in track(["a", "b"], "", "tasks"):
        clock[0] += 40
    assert capsys.readouterr().err.splitlines() == [
        "draw: 1 of 2 images, 0.025 images/s, 0:00:40 left",
        "draw: 2 of 2 images, 0.025 images/s, in 0:01:20",
        "draw: 1 letters, 0.025 letters/s",
        "draw: 2 letters, 0.025 letters/s",
    ]


def test_a_terminal_gets_a_bar() -> None:
    """Square brackets are no markup, and standard output stays free for results."""
    code = (
        "import vdtrain.progress as p; p.QUIET_SECONDS = 0.0\n"
        "with p.Progress('[draw]', 4, 'images') as progress: progress.note = '[bold]'; progress.advance(3)\n"
        "print('result')"
    )
    master, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=terminal, env=environment)
    os.close(terminal)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.stdout == b"result\n"
    assert "[draw]" in shown
    assert "3 of 4 images" in shown
    assert "[bold]" in shown
    assert "\u2501" in shown
