"""Faults of disks, ranks, numbers, servers and users, each of which befalls a stage that is then to end as ever."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.drill.http import Trouble, served
from tests.drill.results import row
from tests.drill.runs import STAGES, End, Stage, Whole, until
from tests.drill.starts import RANKS, Start

WENT_ON, STOPPED, FAILED, REFUSED = [0] * RANKS, [75] * RANKS, [1] * RANKS, [2] * RANKS
SHORT = "watchdog_seconds=10"


@dataclass(frozen=True)
class Fault:
    """What befalls a start of a stage.

    Attributes:
        name: in the table.
        ends: exit statuses, by rank, that the start may have; empty: any but those of a complete stage.
        says: pattern of what it prints.
        rules: of the disk (`tests/faults/shim.c`); RANK is one of the ranks and RUN the stage's folder.
        befalls: for `tests.training.trouble.prepare`; of a random rank.
        acts: what the drill does while it runs.
        settings: of this start.
        after_kill: whether it continues from a start that was killed.
        tries: by default.
        server: how the shards' web server fails, if they come from one.
        dumps: whether a record of where it stood may be printed, for want of a folder.
        persists: whether it befalls the next starts too.
    """

    name: str
    ends: Sequence[list[int]]
    says: str = ""
    rules: str = ""
    befalls: Mapping[str, object] | None = None
    acts: Callable[[Stage, Start, random.Random], str | None] | None = None
    settings: Sequence[str] = ()
    after_kill: bool = False
    tries: int = 3
    server: Trouble | None = None
    dumps: bool = False
    persists: bool = False


def _kill(stage: Stage, start: Start, generator: random.Random) -> None:
    until(lambda: stage.step() > 1, start)
    start.signal(signal.SIGKILL, *start.ranks)


def _stop_for(seconds: float) -> Callable[[Stage, Start, random.Random], None]:
    def act(stage: Stage, start: Start, generator: random.Random) -> None:
        until(lambda: stage.step() > 1, start)
        rank = generator.choice(start.ranks)
        start.signal(signal.SIGSTOP, rank)
        time.sleep(seconds)
        start.signal(signal.SIGCONT, rank)

    return act


def _end(stage: Stage, start: Start, generator: random.Random) -> None:
    until(lambda: stage.step() > 1, start)
    start.signal(signal.SIGTERM, *start.ranks)


def _start_again(stage: Stage, start: Start, generator: random.Random) -> str | None:
    """A second job with the same words, beside the first."""
    until(lambda: stage.step() > 0, start)
    for rank in start.ranks:
        start.signal(signal.SIGSTOP, rank)
    second = stage.start()
    until(lambda: not second.running(), second)
    for rank in start.ranks:
        start.signal(signal.SIGCONT, rank)
    said = [line for line in second.text().splitlines() if line.startswith("error: ")]
    if second.statuses() != REFUSED or len(said) != 1 or "is in use by process" not in said[0]:
        return f"the second job ended with {second.statuses()}: {said}"
    return None


NOT_SAVED = "was not saved"
FAULTS = (
    Fault(
        "disk full for two saves of a rank", [WENT_ON], NOT_SAVED, "write .incomplete/rank errno=28 times=2 rank=RANK"
    ),
    Fault("disk full from some save on", [FAILED], "No space left", "write .incomplete/ errno=28 after=8 rank=RANK"),
    Fault("run folder read-only from some moment on", [], "(?i)read-only", "any RUN/ errno=30 after=60", dumps=True),
    Fault("EIO as a rank syncs its file", [WENT_ON], NOT_SAVED, "sync .incomplete/rank errno=5 times=1 rank=RANK"),
    Fault("EIO as a checkpoint is renamed", [WENT_ON], NOT_SAVED, "rename /checkpoints/step errno=5 times=1"),
    Fault(
        "EIO twice as the checkpoint is read",
        [WENT_ON],
        "Input/output error",
        "read /checkpoints/step errno=5 times=2 rank=RANK",
        after_kill=True,
    ),
    Fault(
        "EIO whenever the checkpoint is read",
        [FAILED],
        "cannot be read",
        "read /checkpoints/step errno=5 rank=RANK",
        settings=[SHORT],
        after_kill=True,
    ),
    Fault("EIO twice as shards are read", [WENT_ON, STOPPED, FAILED], "", "read .tar errno=5 times=2 rank=RANK"),
    Fault(
        "EIO whenever shards are read, from some moment on",
        [STOPPED, FAILED],
        "",
        "read .tar errno=5 after=3 rank=RANK",
        settings=[SHORT],
    ),
    Fault("slow disk under the checkpoints", [WENT_ON], "", "write .incomplete/ rate=300000"),
    Fault("slow rank: its reads take 0.2 s longer", [WENT_ON], "", "read .tar delay=200 rank=RANK"),
    Fault("rank stopped for 5 s", [WENT_ON], "", acts=_stop_for(5)),
    Fault(
        "rank stopped for longer than the watchdog's limit", [], "did not run for", acts=_stop_for(25), settings=[SHORT]
    ),
    Fault(
        "rank hangs",
        [],
        f"longer than {SHORT}",
        befalls={"what": "sleep", "when": "batch", "number": 2},
        settings=[SHORT],
    ),
    Fault(
        "rank hangs with Python's lock",
        [],
        "holds Python's lock",
        befalls={"what": "hold", "when": "batch", "number": 2},
        settings=[SHORT],
    ),
    Fault("SIGTERM of all ranks", [STOPPED], "", acts=_end),
    Fault(
        "NaN in the loss of a rank, and SIGKILL of all ranks",
        [],
        "",
        befalls={"what": "nan", "when": "place", "number": 1},
        acts=_kill,
        persists=True,
    ),
    Fault("web server resets connections", [WENT_ON], "", server=Trouble(reset=0.2)),
    Fault("web server answers 503", [WENT_ON], "", server=Trouble(status=503, failing=0.2)),
    Fault(
        "web server stalls amid an answer",
        [WENT_ON],
        "",
        server=Trouble(stall=0.05),
        settings=["data.stream.timeout=2"],
    ),
    Fault("second job in the run folder", [WENT_ON], "", acts=_start_again),
)


def rows(whole: Whole, seed: int, tries: int | None = None, only: str = "") -> Iterator[dict[str, Any]]:
    """A row of the table for each fault whose name fits a pattern."""
    for fault in (fault for fault in FAULTS if re.search(only, fault.name)):
        yield _row(fault, whole, random.Random(f"{seed}/{fault.name}"), tries or fault.tries)


@dataclass
class _Tried:
    wrong: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    lost: int = 0
    repeated: int = 0
    seconds: list[float] = field(default_factory=list)


def _row(fault: Fault, whole: Whole, generator: random.Random, tries: int) -> dict[str, Any]:
    tried = _Tried()
    for number in range(tries):
        before = len(tried.wrong)
        folder = whole.place / "faults" / f"{FAULTS.index(fault)}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        with served(whole.place, fault.server) as settings:
            _try(fault, whole, folder, generator, settings, tried)
        if len(tried.wrong) == before:
            shutil.rmtree(folder)
    kinds = sorted(set(tried.ends))
    outcome = f"{' or '.join(kinds)}; equal bit for bit" if not tried.wrong else "; ".join(tried.wrong[:3])
    return row(fault.name, tries, outcome, not tried.wrong, tried.lost, tried.repeated, tried.seconds)


def _try(
    fault: Fault, whole: Whole, folder: Path, generator: random.Random, served: Sequence[str], tried: _Tried
) -> None:
    number = generator.randrange(len(STAGES))
    rank = generator.randrange(RANKS)
    befalls = None if fault.befalls is None else {**fault.befalls, "rank": rank}
    stage = Stage(whole.place, folder, number, whole.run, [*fault.settings, *served])
    expected = whole.ends[number]
    if fault.persists:
        expected = _end_with(fault, whole, folder.with_name(folder.name + "-whole"), number, befalls)
        if expected.same_bits(whole.ends[number]):
            tried.wrong.append("the fault changed nothing")
    if fault.after_kill:
        start = stage.start()
        _kill(stage, start, generator)
        start.wait()
    rules = fault.rules.replace("RANK", str(rank)).replace("RUN", str(stage.folder))
    start = stage.start(rules=rules, befalls=befalls)
    told = fault.acts(stage, start, generator) if fault.acts else None
    if not start.wait():
        tried.wrong.append(f"{start.log}: did not end")
    ended, statuses = time.time(), start.statuses()
    if told:
        tried.wrong.append(told)
    if statuses not in fault.ends if fault.ends else 0 in statuses:
        tried.wrong.append(f"{start.log}: ended with {statuses}")
    if fault.rules and "fault: " not in start.text():
        tried.wrong.append(f"{start.log}: the fault did not befall it")
    if not re.search(fault.says, start.text()):
        tried.wrong.append(f"{start.log}: does not say {fault.says!r}")
    if 0 in statuses:
        tried.ends.append("goes on")
    else:
        tried.ends.append("stops and saves" if statuses == STOPPED else "ends")
        start = stage.start(befalls=befalls if fault.persists else None)
        start.wait()
        if (again := stage.first_step_after(ended)) is not None:
            tried.seconds.append(round(again - ended, 2))
    for each in stage.starts:
        if each.traced() and not fault.dumps:
            tried.wrong.append(f"{each.log}: a traceback")
    if not stage.complete():
        tried.wrong.append(f"{start.log}: the same command did not end the stage")
        return
    end = stage.end()
    tried.lost += end.lost(expected)
    tried.repeated += end.repeated(expected)
    if not end.same_bits(expected):
        tried.wrong.append(f"{stage.folder}: another end")


def _end_with(fault: Fault, whole: Whole, folder: Path, number: int, befalls: Mapping[str, object] | None) -> End:
    """The end of a stage that the fault alone befell."""
    shutil.rmtree(folder, ignore_errors=True)
    stage = Stage(whole.place, folder, number, whole.run)
    stage.start(befalls=befalls).wait()
    end = stage.end()
    shutil.rmtree(folder)
    return end
