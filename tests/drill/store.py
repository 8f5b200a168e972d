"""Every file operation of the checkpoint store: killed before it, or amid a write, and refused by the system."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.drill.results import row
from tests.drill.starts import RANKS, fork, wait_for, with_faults
from tests.programs import free_port, of_rank
from tests.programs.server import begin_libraries_anew
from tests.training.read_back import read_weights
from tests.training.test_checkpoints import build, save
from tests.training.toy import Toy, same_bits
from vdtrain.checkpoint.folder import CheckpointError
from vdtrain.checkpoint.store import CheckpointStore, Verification, latest
from vdtrain.run import distributed

KEPT, OLDER, NEWER = 2, (1, 2), 3
# What a save may be: of a new step, or of the newest one again.
SAVES = {"a new step": NEWER, "the newest step again": OLDER[-1]}
# A disk that fails or is closed for a moment, and one that is full or read-only from then on.
REFUSALS = (
    f"errno={errno.EIO} times=1",
    f"errno={errno.EACCES} times=1",
    f"errno={errno.ENOSPC}",
    f"errno={errno.EROFS}",
)
SAVED, REFUSED = 0, 3
MOST = 1000
NOT_REACHED = "not reached"
GROUP_SECONDS = 60.0


def rows(place: Path) -> Iterator[dict[str, Any]]:
    """A row of the table for each kind of fault and save, over all operations of the save."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for ranks in (1, RANKS):
        _together(place, ranks, "", functools.partial(_save_all, place / f"before-{ranks}"))
    for what, step in SAVES.items():
        killed = _row(place, f"killed before each file operation of a save of {what}", 1, step, {"kill": MOST})
        yield killed
        refusals = dict.fromkeys(REFUSALS, killed["tries"])
        yield _row(place, f"each file operation of a save of {what} refused", 1, step, refusals)
    yield _row(place, "one of two ranks killed before each file operation of a save", RANKS, NEWER, {"kill": MOST})


def _save_all(folder: Path) -> None:
    run = build(1)
    for step in OLDER:
        save(CheckpointStore(folder, KEPT), run, {"position": step}, step)


def _row(place: Path, fault: str, ranks: int, step: int, ways: Mapping[str, int]) -> dict[str, Any]:
    """Try the operations one after another, in each way, up to a number."""
    tries, wrong = 0, list[str]()
    for way, operations in ways.items():
        for rank in range(ranks):
            for operation in range(operations):
                told = _attempt(place, ranks, step, f"{way} after={operation} rank={rank}")
                if told == NOT_REACHED:
                    break
                tries += 1
                if told:
                    wrong.append(f"{way} after={operation} rank={rank}: {told}")
    outcome = "a whole checkpoint stays, the next save works" if not wrong else "; ".join(wrong[:3])
    return row(fault, tries, outcome, not wrong)


def _attempt(place: Path, ranks: int, step: int, rule: str) -> str:
    """What is wrong after a save that the rule befell."""
    folder = place / "store"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / f"before-{ranks}", folder)

    def once() -> None:
        run = build(1)
        save(CheckpointStore(folder, KEPT), run, {"position": 10 * step}, step)

    statuses = _together(place, ranks, f"any {folder} {rule}", once)
    kills = rule.startswith("kill")
    if kills and -signal.SIGKILL not in statuses:
        return NOT_REACHED if statuses == [SAVED] * ranks else f"ended with {statuses}"
    if not kills and not set(statuses) <= {SAVED, REFUSED}:
        return f"ended with {statuses}"
    found = latest(folder, Verification.ALONE)
    if found is None:
        return "no checkpoint is left"
    position = found.state["position"]
    if (found.path.name[5:14], position) not in {(f"{OLDER[-1]:09d}", OLDER[-1]), (f"{step:09d}", 10 * step)}:
        return f"{found.path.name} with {position} was found"
    if statuses == [SAVED] * ranks and position != 10 * step:
        return "it said that it had saved"
    if not same_bits(read_weights(found.path), dict(Toy().named_parameters())):
        return f"{found.path.name} holds other weights"
    if (again := _together(place, ranks, "", once)) != [SAVED] * ranks:
        return f"the next save ended with {again}"
    names = sorted(path.name for path in folder.iterdir())
    older = OLDER[-1] if step == NEWER else OLDER[0]
    if names != ["latest", *(f"step-{each:09d}" for each in (older, step))]:
        return f"the next save left {names}"
    return ""


def _together(place: Path, ranks: int, rules: str, action: Callable[[], None]) -> list[int]:
    """Exit statuses of forks that do the same, by rank."""
    port = free_port()
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def body(rank: int) -> int:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(of_rank(rank, ranks, port))
        begin_libraries_anew(dict(os.environ))
        with_faults(rules)
        distributed.start("cpu", GROUP_SECONDS)
        try:
            action()
        except CheckpointError:
            return REFUSED
        return SAVED

    statuses = wait_for([fork(lambda rank=rank: body(rank)) for rank in range(ranks)])  # type: ignore[misc]
    os.close(log)
    return statuses
