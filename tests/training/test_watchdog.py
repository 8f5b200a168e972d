"""Runs that stand still, lose a process or meet an error: they end, say so in a line, and leave a record, or go on."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.pairs import write_pairs
from tests.programs import program
from tests.settings import TINY, phases
from tests.training.forks import Case, Ending, run_cases
from vdtrain.run.watchdog import EXIT_STATUS, Watchdog
from vdtrain.tracking.metrics import read_metrics

MINIATURE = [
    "stage=stage1_single_flow",
    *TINY,
    "stage.init_from=null",
    "stage.global_batch_size=2",
    "hardware.micro_batch_size={32:1,64:1}",
    phases(2, (32, 10)),
    "data.stream._target_=tests.training.trouble.DrillStream",
    "log_every_steps=1",
    "checkpoint.every_steps=2",
]
LIMIT = 12
TROUBLES = {
    "sleeps": {"rank": 1, "what": "sleep", "when": "batch", "number": 2},
    "holds_the_lock": {"rank": 1, "what": "hold", "when": "batch", "number": 2},
    "is_killed": {"rank": 1, "what": "SIGKILL", "when": "batch", "number": 2},
    "wakes_late": {"rank": 1, "what": "pause", "when": "batch", "number": 2, "seconds": 2 * LIMIT},
    "wakes_soon": {"rank": 1, "what": "pause", "when": "batch", "number": 2, "seconds": 8},
    "cannot_read": {"rank": 1, "what": "stream_error", "when": "batch", "number": 2},
    # The save of step 2 is over when that of step 4 begins, and that of step 4 when that of step 6 does.
    "fills_for_a_while": {"rank": 1, "what": "full_disk", "when": "batch", "number": 3, "until": 8},
    "fills": {"rank": 0, "what": "full_disk", "when": "batch", "number": 5},
    "is_stopped": {"rank": 1, "what": "SIGTERM", "when": "batch", "number": 2},
    "cannot_open": {"rank": 1, "what": "stream_error", "when": "open", "number": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watchdog")
    write_pairs(folder / "data", count=10)
    return folder


# Runs that stand still, or end with others that do: each waits for its limit.
WAITING = ("sleeps", "holds_the_lock", "wakes_late", "wakes_soon")


@pytest.fixture(scope="module")
def endings(folder: Path) -> dict[str, Ending]:
    """Runs that wait do so beside those after them; only one begins at a time."""
    cases = {}
    for name, trouble in TROUBLES.items():
        own = [f"data.manifest={folder}/data/manifest", f"run_dir={folder}/{name}", f"watchdog_seconds={LIMIT}"]
        cases[name] = Case(2, [*MINIATURE, *own, f"+data.stream.diary={folder}/{name}-diary"], trouble)
    after = [f"run_dir={folder}/next", f"stage.init_from={folder}/is_stopped", "stage=stage2_dual_flow"]
    later = {name: case for name, case in cases.items() if name not in WAITING}
    later["fills, again"] = Case(2, cases["fills"].arguments)
    later["next stage"] = Case(1, [*cases["is_stopped"].arguments, *after])
    with ThreadPoolExecutor(len(WAITING)) as pool:
        waiting: dict[str, Future[list[Ending]]] = {}
        for name in WAITING:
            waiting[name] = pool.submit(run_cases, folder / f"{name}-cases", [cases[name]])
            log, said = folder / f"{name}-cases" / "0-1.log", f"drill: {TROUBLES[name]['what']}"
            while not waiting[name].done() and not (log.exists() and said in log.read_text()):
                time.sleep(0.05)
        found = dict(zip(later, run_cases(folder / "cases", [*later.values()]), strict=True))
        return found | {name: run.result()[0] for name, run in waiting.items()}


def record(folder: Path, name: str, rank: int) -> str:
    return (folder / name / "dumps" / f"rank-{rank}.txt").read_text()


def errors(ending: Ending, rank: int) -> list[str]:
    return [line for line in ending.logs[rank].splitlines() if line.startswith("error")]


def test_a_rank_that_sleeps_ends_the_job_with_a_record_of_every_rank(endings: dict[str, Ending], folder: Path) -> None:
    assert EXIT_STATUS in endings["sleeps"].statuses
    assert 0 not in endings["sleeps"].statuses
    assert "trouble.py" in record(folder, "sleeps", 1)
    assert "_befall" in record(folder, "sleeps", 1)
    assert "step 3, waiting for data" in record(folder, "sleeps", 1)
    waiting = record(folder, "sleeps", 0)
    assert "all_agree" in waiting
    assert "step 3, waiting for data" in waiting
    assert "gloo:" in waiting
    assert (folder / "sleeps" / "dumps" / "collectives-rank-0").stat().st_size > 0
    (line,) = errors(endings["sleeps"], 1)
    assert "watchdog_seconds=12" in line


def test_a_rank_that_hangs_with_pythons_lock_ends_too(endings: dict[str, Ending], folder: Path) -> None:
    assert 0 not in endings["holds_the_lock"].statuses
    (line,) = errors(endings["holds_the_lock"], 1)
    assert line.endswith("holds Python's lock; its stacks:")
    assert "_befall" in endings["holds_the_lock"].logs[1]
    # The batch is read ahead, so that the other rank may stand still at any place where it waits for this one.
    assert "trainer.py" in record(folder, "holds_the_lock", 0)


def test_a_rank_that_is_killed_ends_the_job(endings: dict[str, Ending], folder: Path) -> None:
    assert endings["is_killed"].statuses == [1, -9]
    assert errors(endings["is_killed"], 0) == [
        "error: process 0: lost the connection to process 1, which has ended; see its log, then run the same command "
        "again"
    ]
    assert "Traceback" not in endings["is_killed"].logs[0]
    assert "Traceback" in record(folder, "is_killed", 0)


def test_a_rank_that_was_stopped_and_wakes_late_says_so(endings: dict[str, Ending]) -> None:
    ending = endings["wakes_late"]
    assert ending.statuses == [EXIT_STATUS, 1], ending
    (line,) = errors(ending, 0)
    assert "; process 1 did not run; see " in line
    (warning,) = re.findall("^warning: process 1 did not run for .*", ending.logs[1], re.MULTILINE)
    assert warning.endswith("(SIGSTOP, Ctrl-Z), or its machine was suspended or moved")
    (line,) = errors(ending, 1)
    assert re.fullmatch(
        "error: process 1: did not run for 2[0-9] s and lost the others; run the same command again", line
    )


def test_a_rank_that_was_stopped_for_less_than_the_limit_goes_on(endings: dict[str, Ending]) -> None:
    assert endings["wakes_soon"].statuses == [0, 0]
    assert "warning: process 1 did not run for " in endings["wakes_soon"].logs[1]


def test_data_that_cannot_be_read_is_one_line(endings: dict[str, Ending], folder: Path) -> None:
    ending = endings["cannot_read"]
    assert ending.statuses == [1, 1]
    (line,) = errors(ending, 0)
    assert line == (
        "error: process 1: shard 7: is not there; bring it back; step 2 is saved, and the same command continues"
    )
    assert errors(ending, 1) == []
    assert (folder / "cannot_read" / "checkpoints" / "latest").read_text() == "step-000000002\n"
    assert "Traceback" not in "".join(ending.logs)
    assert "StreamError" in record(folder, "cannot_read", 1)


def test_data_that_one_rank_cannot_open_is_one_line_of_all(endings: dict[str, Ending]) -> None:
    ending = endings["cannot_open"]
    assert ending.statuses == [1, 1]
    assert errors(ending, 0) == ["error: process 1: shard 7: is not there; bring it back"]
    assert errors(ending, 1) == []


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_more(
    endings: dict[str, Ending], folder: Path
) -> None:
    ending = endings["fills_for_a_while"]
    assert ending.statuses == [0, 0]
    warnings = [line for line in ending.logs[0].splitlines() if line.startswith("warning: ")]
    (four,) = [
        line for line in warnings if "step 4 was not saved: process 1: cannot be written (File too large)" in line
    ]
    assert "training goes on, and the next save tries again" in four
    assert "warning" not in ending.logs[1]
    records = read_metrics(folder / "fills_for_a_while")
    assert records[0]["failed_saves"] == 0
    assert records[-1]["failed_saves"] >= 1
    assert (folder / "fills_for_a_while" / "checkpoints" / "latest").read_text() == "step-000000010\n"


def test_a_run_that_cannot_save_its_end_says_so_and_is_taken_up_again(endings: dict[str, Ending]) -> None:
    assert endings["fills"].statuses == [1, 1]
    (line,) = errors(endings["fills"], 0)
    assert "step 10 was not saved: process 0: cannot be written (File too large)" in line
    assert line.endswith("; raise the limit (`ulimit -f unlimited`), then run the same command again")
    assert errors(endings["fills"], 1) == []
    again = endings["fills, again"]
    assert again.statuses == [0, 0]
    assert "continues from" in again.logs[0]


def test_a_stage_that_starts_from_an_unfinished_one_warns(endings: dict[str, Ending]) -> None:
    assert endings["is_stopped"].statuses == [75, 75]
    ending = endings["next stage"]
    assert ending.statuses == [0]
    (warning,) = [line for line in ending.logs[0].splitlines() if line.startswith("warning: ")]
    assert re.search("stage1_single_flow stopped there at step [23] of 10", warning)


def test_no_limit_watches_nothing_and_still_records(tmp_path: Path) -> None:
    watchdog = Watchdog(None, tmp_path / "dumps", rank=3)
    assert not list(tmp_path.iterdir())
    watchdog.heartbeat("step 5")
    try:
        raise ValueError("told apart")
    except ValueError as error:
        watchdog.record("first", error)
    watchdog.record("second")
    watchdog.close()
    text = (tmp_path / "dumps" / "rank-3.txt").read_text()
    assert text.index("first") < text.index("told apart") < text.index("second")
    assert "at: step 5" in text
    assert "test_no_limit_watches_nothing" in text


def test_a_record_that_cannot_be_written_goes_to_standard_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dumps").write_text("a file stands where the folder should")
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    Watchdog(None, tmp_path / "dumps", rank=0).record("why")
    assert "why" in capfd.readouterr().err


def test_a_hang_with_pythons_lock_right_at_the_start_ends_too(tmp_path: Path) -> None:
    """Before the watching thread had its first turn."""
    code = (
        "import ctypes, pathlib, sys\n"
        "from vdtrain.run.watchdog import Watchdog\n"
        "Watchdog(2.0, pathlib.Path(sys.argv[1]), rank=0)\n"
        "while True:\n"  # a signal ends the sleep
        "    ctypes.PyDLL(None).sleep(3600)\n"
    )
    words = [program("python"), "-c", code, str(tmp_path)]
    ending = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ending.returncode != 0
    assert "stood still for 2 s and holds Python's lock" in ending.stderr


def test_one_action_may_take_longer_than_a_step(tmp_path: Path) -> None:
    """The thread watches on: a sleep within the longer time passes, the same sleep after it does not."""
    code = (
        "import pathlib, sys, time\n"
        "from vdtrain.run.watchdog import Watchdog\n"
        "watchdog = Watchdog(1.0, pathlib.Path(sys.argv[1]), rank=0)\n"
        "with watchdog.patient('compiling', 100): time.sleep(3)\n"
        "print('compiled', flush=True)\n"
        "time.sleep(60)\n"
    )
    words = [program("python"), "-c", code, str(tmp_path)]
    ending = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (ending.returncode, ending.stdout) == (EXIT_STATUS, "compiled\n")
    assert "longer than watchdog_seconds=1, at: compiling" in ending.stderr


def test_a_stall_is_told_before_the_limit_and_once(tmp_path: Path) -> None:
    told: list[str] = []
    heard = threading.Event()

    def hear(line: str) -> None:
        told.append(line)
        heard.set()

    watchdog = Watchdog(LIMIT, tmp_path, rank=0)
    try:
        watchdog.on_stall = hear
        watchdog.heartbeat("step 7, waiting for data")
        assert heard.wait(LIMIT)
        watchdog.heartbeat("step 8")
    finally:
        watchdog.close()
    (line,) = told
    assert re.fullmatch(rf"no step for \d+ s, at: step 7, waiting for data; the run ends after {LIMIT} s", line)
