"""Random kills of three-stage runs, each of which goes on by the same command until the curriculum ends."""

from __future__ import annotations

import math
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.drill.runs import STAGES, STEPS, Stage, Whole, until
from tests.drill.starts import Start

WHOM = ("all ranks", "one rank", "launcher")
WHEN = ("at the start", "between steps", "while saving", "as the loader delivers")
KINDS = [(whom, when) for whom in WHOM for when in WHEN]
# Starts of a stage that end before their kill comes, and the last one.
MISSES = 5
# Until the first step of a start of interpreters.
FRESH_SECONDS = 25.0


@dataclass
class Kill:
    """One kill.

    Attributes:
        stage: from 1.
        step: in the metrics at that moment.
        ended: seconds until all processes had ended by themselves; None if they had to be killed.
        recovered: seconds until the next start had trained a step, or had found the stage complete; None if that was
            killed before.
        fresh: whether interpreters were started, by torchrun.
    """

    whom: str
    when: str
    stage: int
    step: int
    fresh: bool
    ended: float | None = None
    recovered: float | None = None


@dataclass
class Run:
    """One run from its first start to the end of stage 3."""

    number: int
    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    equal: bool = True
    lost: int = 0
    repeated: int = 0
    faults: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For the results."""
        return asdict(self)


def run(number: int, seed: int, most: int, whole: Whole, fresh_every: int, all_of_them: bool = False) -> Run:
    """Hold a run with at most `most` kills; its folder stays if it was at fault.

    Args:
        fresh_every: of so many starts, one is of interpreters; 0: no one is.
        all_of_them: the stages share `most` kills, rather than draw how many each has.
    """
    generator = random.Random(f"{seed}/{number}")
    kinds = _kinds(generator)
    found = Run(number)
    place = whole.place / "runs" / str(number)
    shutil.rmtree(place, ignore_errors=True)
    for index in range(len(STAGES)):
        stage = Stage(whole.place, place, index)
        left = most - len(found.kills)
        left = math.ceil(left / (len(STAGES) - index)) if all_of_them else min(left, generator.choice((2, 3, 4, 5)))
        before: tuple[Kill, float] | None = None
        for _ in range(left + MISSES):
            fresh = bool(fresh_every) and generator.randrange(fresh_every) == 0
            began, start = time.time(), stage.start(fresh=fresh)
            kill = _kill(stage, start, next(kinds), generator, whole) if left else None
            moment = time.time()
            if not start.wait():
                found.faults.append(f"{start.log}: did not end by itself")
            elif kill is not None:
                kill.ended = round(time.time() - moment, 2)
            if before is not None and (again := stage.first_step_after(began)) is not None:
                before[0].recovered = round(again - before[1], 2)
            before = None if kill is None else (kill, moment)
            if kill is not None:
                kill.stage = index + 1
                found.kills.append(kill)
                left -= 1
            elif stage.complete():
                break
        found.starts += len(stage.starts)
        found.faults += [f"{start.log}: a traceback" for start in stage.starts if start.traced()]
        if not stage.complete():
            found.faults.append(f"{stage.folder} did not end: {stage.starts[-1].text()[-2000:]}")
            found.equal = False
            break
        end, expected = stage.end(), whole.ends[index]
        found.equal = found.equal and end.same_bits(expected)
        found.lost += end.lost(expected)
        found.repeated += end.repeated(expected)
    if found.equal and not (found.lost or found.repeated or found.faults):
        shutil.rmtree(place)
    return found


def _kinds(generator: random.Random) -> Iterator[tuple[str, str]]:
    """Whom to kill, and when, without end; each as often as the others."""
    while True:
        yield from generator.sample(KINDS, len(KINDS))


def _kill(stage: Stage, start: Start, kind: tuple[str, str], generator: random.Random, whole: Whole) -> Kill | None:
    """Wait for the moment, and kill; None if the start ended before."""
    (whom, when), some, before = kind, generator.random(), stage.step()
    steps = generator.randrange(max(1, min(3, STEPS - before)))
    if when == "at the start":
        moment = start.began + some * (FRESH_SECONDS if start.fresh else whole.first_seconds)
        until(lambda: time.monotonic() > moment, start)
    elif when == "between steps":
        until(lambda: stage.step() > before + steps, start)
        time.sleep(some * 0.1)
    elif when == "while saving":
        until(lambda: stage.step() >= before + steps and stage.saving(), start)
        time.sleep(some * 0.02)
    else:
        until(lambda: stage.delivered() > 2 * steps, start)
        time.sleep(some * 0.05)
    ranks = start.ranks
    if not start.running() or not (ranks or whom == "launcher"):
        return None
    pids = {"all ranks": ranks, "one rank": [generator.choice(ranks or [0])], "launcher": [start.launcher]}[whom]
    killed = Kill(whom, when, 0, stage.step(), start.fresh)
    start.signal(signal.SIGKILL, *pids)
    return killed
