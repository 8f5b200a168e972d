"""Ranks that end: with their launcher, with a process that is lost while groups form, and after they were stopped."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cases import with_slow
from tests.pairs import write_pairs
from tests.programs import free_port, run_ranks
from tests.settings import phases
from tests.training.test_watchdog import MINIATURE, errors
from vdtrain.run import distributed, processes

WAIT = (
    "from vdtrain.run.signals import begin; begin(); import os, time; print(os.getpid(), flush=True); time.sleep(600)"
)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    """The last process alone finds no manifest, as on a node that lacks a disk. No launcher ends the first."""
    manifest = write_pairs(tmp_path / "data", shards=2, count=8)
    common = ["-m", "vdtrain", "train", *MINIATURE, f"run_dir={tmp_path}/run", phases(2, (32, 4))]
    last = [*common, f"stage.init_from={tmp_path}/gone"]
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    ending = run_ranks(
        [[*common, f"data.manifest={manifest}"], [*last, f"data.manifest={manifest}"]], logs, 200, python=sys.executable
    )
    assert ending.statuses == [1, 2], ending
    (line,) = errors(ending, 0)
    said = f"process 1 will not come: stage.init_from={tmp_path}/gone"
    assert line.startswith(f"error: process 0: {said}") or line.startswith(f"error: {said}"), ending
    assert "Traceback" not in "".join(ending.logs)


@pytest.mark.slow
def test_a_mistake_of_all_processes_keeps_none_waiting(tmp_path: Path) -> None:
    words = ["-m", "vdtrain", "train", *MINIATURE, f"run_dir={tmp_path}/run", f"stage.init_from={tmp_path}/gone"]
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    ending = run_ranks([words, words], logs, 200, python=sys.executable)
    assert ending.statuses == [2, 2], ending
    assert len(errors(ending, 0)) == 1, ending
    assert errors(ending, 1) == [], ending


# A launcher as torchrun or slurmstepd is one: it gives its ranks variables that it does not have.
LAUNCHER = """
import os, signal, subprocess, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
words = sys.argv[2:]
rank = subprocess.Popen(words, env={**os.environ, **dict([sys.argv[1].split("=", 1)])}, start_new_session=True)
rank.wait()
"""


@pytest.mark.parametrize(
    ("mark", "wrapper", "ends"),
    [
        ("TORCHELASTIC_RUN_ID=1", [], True),
        ("SLURM_PROCID=0", [], True),
        ("OMPI_COMM_WORLD_RANK=0", [], True),
        # A wrapper between them is no launcher.
        ("TORCHELASTIC_RUN_ID=1", ["bash", "-c", '"$@"; exit $?', "wrapper"], True),
        # Started by hand: the shell may end.
        ("RANK=0", [], False),
        ("OTHER=0", [], False),
        # It is to live on.
        ("TORCHELASTIC_RUN_ID=1", ["nohup"], False),
    ],
)
def test_a_rank_ends_with_its_launcher(mark: str, wrapper: list[str], ends: bool) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "TORCHELASTIC_RUN_ID")}
    variables["SLURM_STEP_ID"] = "0"
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, mark, *wrapper, sys.executable, "-c", WAIT],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    rank = int(process.stdout.readline())
    try:
        time.sleep(0.3)
        process.kill()
        if ends:
            wait_until(lambda: not alive(rank))
            (line,) = process.stderr.read().splitlines()
            assert re.fullmatch(rf"stopped: \S+ \(process {process.pid}\) launched this process and has ended", line)
        else:
            time.sleep(1)
            assert alive(rank)
    finally:
        process.wait()
        if alive(rank):
            os.kill(rank, signal.SIGKILL)


def test_a_launcher_that_leaves_its_rank_to_init_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.os, "getppid", lambda: 1)
    assert processes.launchers({"TORCHELASTIC_RUN_ID": "1"}) == {}


def befall(plan: dict[str, str]) -> None:
    """Let the second process be lost when it reaches a function, or never come."""
    if "join" in plan:
        distributed.JOIN_SECONDS = float(plan["join"])
    if os.environ["RANK"] == "1":
        module, name = plan["at"].split(":")
        ends = {"dies": lambda: os.kill(os.getpid(), signal.SIGKILL), "sleeps": lambda: time.sleep(12)}
        setattr(importlib.import_module(module), name, lambda *_, **__: ends[plan["what"]]())


TRAIN = ["vdtrain", "train", *MINIATURE, "data.manifest=FOLDER/data/manifest", "run_dir=FOLDER/run"]


LOST = {
    "while groups form": (
        {"at": "torch.distributed:init_process_group", "what": "dies"},
        "lost process 1 while the groups formed; see its log, then run the same command again",
    ),
    # gloo may notice it first.
    "while it builds": (
        {"at": "vdtrain.training.session:build_trainer", "what": "dies"},
        "lost .*process 1.*; see its log, then run the same command again",
    ),
    "does not come": (
        {"at": "vdtrain.run.distributed:Company", "what": "sleeps", "join": "4"},
        "process 1 did not come within 4 s; see why in the log there, then start all of them again",
    ),
    # To the watchdog, a process that waits for another one has not hung.
    "watchdog": (
        {"at": "vdtrain.run.distributed:Company", "what": "sleeps", "join": "9", "watchdog": "5"},
        "process 1 did not come within 9 s; see why in the log there, then start all of them again",
    ),
}


@pytest.mark.parametrize(("plan", "line"), with_slow(LOST, ["while groups form", "watchdog"]))
def test_a_process_that_is_lost_at_the_start_ends_the_others(tmp_path: Path, plan: dict[str, str], line: str) -> None:
    write_pairs(tmp_path / "data", count=10)
    words = [word.replace("FOLDER", str(tmp_path)) for word in TRAIN]
    words += [f"watchdog_seconds={plan['watchdog']}"] if "watchdog" in plan else []
    start = ["-m", "tests.programs.after", f"{__name__}:befall", json.dumps(plan)]
    ending = run_ranks([[*start, *words]] * 2, [tmp_path / f"{rank}.log" for rank in range(2)], 60)
    assert ending.statuses[0] == 1, ending
    (said,) = errors(ending, 0)
    assert re.fullmatch(f"error: process 0: {line}", said)
    assert "Traceback" not in ending.logs[0]


@pytest.mark.parametrize("name", ["vdtrain", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_ranks_of_a_killed_launcher_save_and_end(tmp_path: Path, name: str) -> None:
    write_pairs(tmp_path / "data", count=10)
    words = [word.replace("FOLDER", str(tmp_path)) for word in TRAIN]
    more = ["data.stream._target_=vdtrain.data.stream.PairStream", phases(2, (32, 100_000)), "log_every_steps=1"]
    launcher = [sys.executable]
    if name == "torchrun":
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    else:
        more.append("gpus=2")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*launcher, "-m", *words, *more], stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: "step 2" in (tmp_path / "log").read_text() or process.poll() is not None, 240)
        ranks = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(alive(rank.pid) for rank in ranks))
    text = (tmp_path / "log").read_text()
    warning = f"warning: {name} (process {process.pid}) launched this process and has ended; the run stops at the next"
    assert text.count(warning) == 1
    assert "Traceback" not in text
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()
