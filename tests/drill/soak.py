"""A long run whose processes must not grow: memory, open files and threads of each, as steps go by."""

from __future__ import annotations

import itertools
import shutil
import statistics
import time
from collections.abc import Iterator
from typing import Any

import psutil

from tests.drill.results import row
from tests.drill.runs import BATCH, STAGES, Stage, Whole
from tests.drill.starts import RANKS, Start
from tests.settings import phases

EVERY = 1000
# Between two looks at the processes. Of those within EVERY steps the least of each figure counts: a batch, a save or a
# read in flight adds to it for a moment.
LOOK_SECONDS = 1.0
# Steps before a process counts as settled: until then rank 0 takes some 40 MB more.
SETTLED = 4000
MEGABYTE = 1e6
# Of memory, in 1,000 steps.
GROWTH_MEGABYTES = 1.0


def measure(pids: list[int]) -> list[dict[str, float]]:
    """Memory that a process shares with nobody, in MB, and its open files and threads."""
    found = []
    for process in map(psutil.Process, pids):
        memory = process.memory_full_info().uss / MEGABYTE
        found.append({"MB": round(memory, 2), "files": process.num_fds(), "threads": process.num_threads()})
    return found


def growth(series: list[list[float]]) -> float:
    """MB in 1,000 steps of [step, MB] points: the median slope of all pairs (Theil and Sen).

    The allocator keeps some 20 MB at times and gives them back. A line by least squares follows such points.
    """
    pairs = itertools.combinations(series, 2)
    return statistics.median(1000 * (after - before) / (end - begin) for (begin, before), (end, after) in pairs)


def rows(whole: Whole, steps: int) -> Iterator[dict[str, Any]]:
    """Train stage 3 for so many steps by real interpreters; the row of the table, every 1,000 of them anew."""
    place = whole.place / "soak"
    shutil.rmtree(place, ignore_errors=True)
    settings = [phases(BATCH, (32, steps)), f"checkpoint.every_steps={EVERY // 4}", "log_every_steps=50"]
    stage = Stage(whole.place, place, len(STAGES) - 1, whole.run, settings)
    # The product's own stream, which keeps no diary.
    words = [word for word in stage.words if "tests.training.trouble" not in word]
    start = Start(words, place / "soak.log", fresh=True)
    points: list[tuple[int, list[dict[str, float]]]] = []
    least: list[dict[str, float]] = []
    while start.running():
        time.sleep(LOOK_SECONDS)
        step = stage.step()
        # At the last step the processes already close their files.
        if not step or step >= steps or len(start.ranks) != RANKS:
            continue
        try:
            found = measure(start.ranks)
        except psutil.Error:
            continue
        least = [
            {what: min(one[what], other[what]) for what in one}
            for one, other in zip(least or found, found, strict=True)
        ]
        if step >= EVERY * (len(points) + 1):
            points.append((step, least))
            least = []
            yield _row(points, [], step, steps)
    wrong = ["a traceback"] if start.traced() else []
    if stage.step() != steps:
        wrong.append(f"it ended at step {stage.step()}: {start.text()[-500:]}")
    yield _row(points, wrong, stage.step() or 0, steps)
    if not wrong:
        shutil.rmtree(place)


def _row(points: list[tuple[int, list[dict[str, float]]]], wrong: list[str], done: int, steps: int) -> dict[str, Any]:
    settled = [point for point in points if point[0] >= min(SETTLED, steps // 3)]
    told, held = [], len(settled) > 1 and not wrong
    for rank in range(RANKS if len(settled) > 1 else 0):
        grown = growth([[step, each[rank]["MB"]] for step, each in settled])
        kinds = {what: {each[rank][what] for _, each in settled} for what in ("files", "threads")}
        held = held and grown <= GROWTH_MEGABYTES and all(len(kind) == 1 for kind in kinds.values())
        counts = ", ".join(f"{min(kind)} to {max(kind)} {what}" for what, kind in kinds.items())
        told.append(f"rank {rank}: {settled[-1][1][rank]['MB']:.0f} MB, {grown:+.2f} MB in 1,000 steps, {counts}")
    made = row("soak", done, "; ".join([*told, *wrong]), held)
    return made | {"points": points}
