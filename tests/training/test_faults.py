"""Disks that fail, crawl or hang under real processes on two ranks."""

from __future__ import annotations

import errno
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import faults
from tests.pairs import write_pairs
from tests.programs import Ending, run_ranks
from tests.settings import TINY, phases
from tests.training.forks import Case, run_cases
from vdtrain.checkpoint.folder import CHECKPOINTS, candidates
from vdtrain.run.watchdog import EXIT_STATUS
from vdtrain.tracking.metrics import METRICS_FILE

LIMIT = 10
NEWEST = "step-000000002"
MINIATURE = [
    "stage=stage1_single_flow",
    *TINY,
    "stage.init_from=null",
    "stage.global_batch_size=2",
    "hardware.micro_batch_size={32:1,64:1}",
    "log_every_steps=1",
    "checkpoint.every_steps=1",
    "checkpoint.keep=2",
    f"watchdog_seconds={LIMIT}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`folder`/run ended after two steps, with their checkpoints; the tests go on with a longer phase."""
    folder = tmp_path_factory.mktemp("faults")
    write_pairs(folder / "data", count=10)
    (ending,) = run_cases(folder / "cases", [Case(2, [*words(folder, "run"), phases(2, (32, 2))])])
    assert ending.statuses == [0, 0], ending
    names = [path.name for path in candidates(folder / "run" / CHECKPOINTS)]
    assert names == [NEWEST, "step-000000001"], ending
    return folder


def words(folder: Path, run: str) -> list[str]:
    return [*MINIATURE, f"data.manifest={folder}/data/manifest", f"run_dir={folder}/{run}"]


def train(folder: Path, run: str, *rules: str, extra: tuple[str, ...] = ()) -> Ending:
    """Two ranks with the faulty disk, on a copy of the run."""
    if not (folder / run).exists():
        shutil.copytree(folder / "run", folder / run)
    command = ["-m", "vdtrain", "train", *words(folder, run), phases(2, (32, 4)), *extra]
    logs = [folder / f"{run}-{rank}.log" for rank in range(2)]
    return run_ranks([command] * 2, logs, 500, faults.variables(folder, *rules))


def state(run: Path) -> dict[str, bytes]:
    """What a start that fails must leave."""
    kept = [*(run / CHECKPOINTS).rglob("*"), run / METRICS_FILE, run / "saved.json", run / "restarts.jsonl"]
    return {str(path): path.read_bytes() for path in kept if path.is_file()}


def errors(ending: Ending) -> list[str]:
    return [line for log in ending.logs for line in log.splitlines() if line.startswith("error: ")]


def test_an_error_of_one_ranks_disk_stops_the_start_of_all(folder: Path) -> None:
    before = {key.replace("/run/", "/broken/"): value for key, value in state(folder / "run").items()}
    ending = train(folder, "broken", f"read /{NEWEST}/rank errno={errno.EIO} rank=1")
    assert ending.statuses == [1, 1], ending
    (line,) = errors(ending)
    assert f"/{NEWEST}/rank-00001-of-00002.safetensors: cannot be read (Input/output error" in line
    assert f"or move {folder}/broken/checkpoints/{NEWEST} away to go on from an older one" in line
    assert "or begin anew in another run_dir" in line
    assert "trying again for 2.5 s" in ending.logs[0]
    assert "Traceback" not in "".join(ending.logs)
    assert state(folder / "broken") == before


@pytest.mark.slow
def test_a_disk_that_errs_for_a_moment_and_crawls_is_waited_for(folder: Path) -> None:
    """Loading and the last save, after a signal, each take longer than `watchdog_seconds`."""
    files = (folder / "run" / CHECKPOINTS / NEWEST).glob("*.safetensors")
    slowest = max(path.stat().st_size for path in files)
    rate = slowest / (1.5 * LIMIT)
    stop = ("data.stream._target_=tests.tiny_runs.EndingStream", "+data.stream.name=SIGTERM", "+data.stream.at=0")
    ending = train(
        folder,
        "slow",
        f"read /{NEWEST}/rank errno={errno.ESTALE} times=1 rank=1",
        f"read /{NEWEST}/rank rate={rate:.0f} rank=1",
        f"write .incomplete/rank rate={rate:.0f} rank=1",
        extra=stop,
    )
    assert ending.statuses == [75, 75], ending
    assert f"continues from {folder}/slow/checkpoints/{NEWEST}" in ending.logs[0]
    assert "Stale file handle" in ending.logs[0]
    assert errors(ending) == []
    newest = candidates(folder / "slow" / CHECKPOINTS)[0]
    assert newest.name > NEWEST
    assert json.loads((folder / "slow" / "saved.json").read_text())["step"] == int(newest.name[5:])


# Where a disk hangs: the rule, and what the run was doing.
HANGS = {
    "save": ("sync .incomplete/rank hang rank=1", "checkpoint"),
    "load": (f"read /{NEWEST}/rank hang rank=1", "looking for the checkpoint to start from"),
}


@pytest.fixture(scope="module")
def hung(folder: Path) -> dict[str, Ending]:
    """Runs on disks that hang, at once: they only wait."""
    with ThreadPoolExecutor(len(HANGS)) as pool:
        endings = pool.map(lambda name: train(folder, name, HANGS[name][0]), HANGS)
        return dict(zip(HANGS, endings, strict=True))


@pytest.mark.parametrize("name", HANGS)
def test_a_disk_that_hangs_ends_the_job(folder: Path, hung: dict[str, Ending], name: str) -> None:
    ending, place = hung[name], HANGS[name][1]
    assert EXIT_STATUS in ending.statuses, ending
    assert 0 not in ending.statuses
    assert any(f"longer than watchdog_seconds={LIMIT}" in line and place in line for line in errors(ending)), ending
    assert candidates(folder / name / CHECKPOINTS)[0].name == NEWEST


def test_weights_to_start_from_that_nobody_may_read_are_not_replaced_by_random_ones(folder: Path) -> None:
    (folder / "fresh").mkdir()
    ending = train(
        folder, "fresh", f"list {folder}/run/checkpoints errno={errno.EACCES}", extra=(f"stage.init_from={folder}/run",)
    )
    assert ending.statuses == [1, 1], ending
    (line,) = errors(ending)
    assert line.startswith(f"error: stage.init_from={folder}/run: {folder}/run/checkpoints: cannot be read (permission")
    assert not (folder / "fresh" / CHECKPOINTS).exists()
