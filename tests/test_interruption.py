"""Ctrl-C, twice too, and SIGTERM end every command at any moment: one line, status 130 or 143, no process is left."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.settings import phases
from tests.world import TRAIN, WRITERS, last_words

SMALL = ["stage.global_batch_size=2", "hardware.micro_batch_size={32:1,64:1}", phases(2, (32, 100_000))]
RUN = ["stage=stage1_single_flow", *TRAIN, *SMALL, "run_dir=OUT/run"]
COMMANDS = {
    **{name: words for name, words in WRITERS.items() if name not in ("select", "selected", "shapes")},
    "train": ["vdtrain", "train", *RUN],
    # It starts others, which are not in its group.
    "processes": ["vdtrain", "train", *RUN, "gpus=2"],
    "plan": ["vdtrain", "plan", *RUN, "gpus=1"],
    "bench": ["vdtrain", "bench", *RUN[:-1], "micro_batches=1", "output=OUT/bench.json", "resolution=32"],
    "import": ["vdtrain", "weights", "import", "versatile_diffusion", "FOLDER/model", "model=tiny", "output=OUT/w"],
    "help": ["vdtrain", "--help"],
}
# The interpreter itself takes as long until the first line of a command.
FIRST = 0.2
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


def begin(words: list[str], folder: Path) -> subprocess.Popen[str]:
    words = [word.replace("OUT", str(folder / "out")).replace("FOLDER", str(folder)) for word in words]
    command = [sys.executable, "-m", *words[2:]] if words[:2] == ["python", "-m"] else [sys.executable, "-m", *words]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, start_new_session=True, cwd=folder, **pipes)  # type: ignore[call-overload,no-any-return]


def interrupt(process: subprocess.Popen[str], number: signal.Signals, times: int = 1) -> str:
    """Send a signal to the process and all its group, as a terminal does; what it said on standard error."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for turn in range(times):
        if turn:
            time.sleep(0.05)
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
    _, said = process.communicate(timeout=60)
    _, left = psutil.wait_procs(family, timeout=10)
    assert left == []
    return said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, origin: Path) -> Path:
    folder = tmp_path_factory.mktemp("interruption") / "w"
    shutil.copytree(origin, folder)
    (folder / "out").mkdir()
    return folder


def check(place: Path, name: str, number: signal.Signals, after: float, times: int = 1) -> None:
    """Interrupt a command after some seconds, unless it has ended before."""
    process = begin(COMMANDS[name], place)
    time.sleep(after)
    said = interrupt(process, number, times)
    case = (name, number.name, after, process.returncode, said)
    assert "Traceback" not in said, case
    assert not list((place / "out").rglob("*.incomplete*")) or times > 1, case
    # It had ended, or all but the interpreter had, or training has saved.
    trains = name in ("train", "processes")
    if process.returncode in (0, -number) or (trains and process.returncode in (75, 130) and not said):
        return
    # An evaluation that has begun asks its scheduler to start it again.
    asks = [os.EX_TEMPFAIL] * (name == "evaluate" and number == signal.SIGTERM)
    assert process.returncode in (128 + number, *asks), case
    lines = last_words(said)
    assert len(lines) == 1, case
    advice = "(; (run it again to continue|the same command continues))?"
    assert re.fullmatch(f"stopped by {NAMES[number]}{advice}", lines[0]), case


@pytest.mark.parametrize(
    ("name", "number", "after", "times"),
    [
        # While the modules of the command are imported, and PyTorch.
        ("plan", signal.SIGTERM, 0.4, 1),
        pytest.param("train", signal.SIGINT, 1.0, 1, marks=pytest.mark.slow),
        ("sample", signal.SIGINT, 1.5, 2),
        pytest.param("processes", signal.SIGINT, 6.0, 1, marks=pytest.mark.slow),
        # With worker processes that start.
        ("index", signal.SIGINT, 2.5, 1),
        pytest.param("index", signal.SIGTERM, 2.0, 2, marks=pytest.mark.slow),
    ],
)
def test_an_interruption_is_one_line(place: Path, name: str, number: signal.Signals, after: float, times: int) -> None:
    check(place, name, number, after, times)


def test_the_last_line_is_a_line_of_its_own() -> None:
    """The signal comes after a line's text and before its end, which print writes by itself."""
    code = (
        "from vdtrain.run.signals import begin; begin(); import os, signal, sys; "
        "sys.stderr.write('takes: a model'); os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "takes: a model\nstopped by Ctrl-C\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_at_random_moments(place: Path, name: str) -> None:
    generator = random.Random(name)
    for _ in range(4):
        # A command that ended before its signal leaves an output that the next one would refuse.
        shutil.rmtree(place / "out")
        (place / "out").mkdir()
        number = generator.choice([signal.SIGINT, signal.SIGTERM])
        check(place, name, number, generator.uniform(FIRST, 8), generator.choice([1, 1, 2]))
