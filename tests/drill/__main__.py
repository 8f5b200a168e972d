"""`python -m tests.drill [PART ...]`: kill, starve and confuse runs, and show that nothing is lost.

`make drill` holds all parts. Results are kept after every run and row; the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.drill import faults, kills, others, soak, store
from tests.drill.results import RESULT, Results, held, text, write_page
from tests.drill.runs import DrillError, whole
from tests.drill.starts import preloaded, warm
from tests.faults import variables

PARTS = ("kills", "store", "faults", "fuzz", "soak", "audit")
KILLS_IN_A_RUN = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Hold the drill; returns the exit status: 1 if something was lost or did not end as promised."""
    parser = argparse.ArgumentParser(prog="python -m tests.drill", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--kills", type=int, default=200, help="random kills, at least")
    parser.add_argument("--runs", type=int, default=0, metavar="N", help="that share them; 0: each draws how many")
    parser.add_argument("--fresh", type=int, default=20, metavar="N", help="one of N starts is by torchrun; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the random kills")
    parser.add_argument("--tries", type=int, help="of each fault")
    parser.add_argument("--only", default="", metavar="PATTERN", help="of names of faults and fuzz targets")
    parser.add_argument("--minutes", type=float, default=10, help="of odd inputs, for each target")
    parser.add_argument("--steps", type=int, default=20_000, help="of the soak")
    parser.add_argument("--folder", type=Path, default=Path("drill"), help="for data and runs")
    parser.add_argument("--result", type=Path, default=RESULT, help="for the figures")
    parser.add_argument("--record", action="store_true", help="put the table into docs/reliability.md")
    given = parser.parse_args(argv)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    given.folder = given.folder.resolve()
    results = Results(given.result, given.seed)
    # A script's background jobs ignore Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        _hold(given.parts or PARTS, given, results)
    except DrillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    print(text(results.read()), end="")
    if given.record:
        write_page(results.read())
    return 0 if held(results.read()) else 1


def _hold(parts: Sequence[str], given: argparse.Namespace, results: Results) -> None:
    if {"store", "faults"} & set(parts) and not preloaded():
        preload(given.folder)
    if {"kills", "store", "faults"} & set(parts):
        warm()
    undisturbed = whole(given.folder) if {"kills", "faults", "soak"} & set(parts) else None
    while undisturbed and "kills" in parts and (left := given.kills - results.kills()) > 0:
        number = len(results.read()["runs"])
        shared = given.runs > number
        most = math.ceil(left / (given.runs - number)) if shared else min(left, KILLS_IN_A_RUN)
        run = kills.run(number, given.seed, most, undisturbed, given.fresh, shared)
        results.add_run(run.record())
        print(f"run {number}: {len(run.kills)} kills, {run.starts} starts, equal: {run.equal}", flush=True)
        for fault in run.faults:
            print(fault, flush=True)
    rows: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "store": lambda: store.rows(given.folder / "store"),
        "faults": lambda: faults.rows(undisturbed, given.seed, given.tries, given.only) if undisturbed else (),
        "fuzz": lambda: others.fuzz(given.minutes, given.folder, given.only),
        "soak": lambda: soak.rows(undisturbed, given.steps) if undisturbed else (),
        "audit": lambda: [others.audit(given.folder)],
    }
    for part in rows:
        for made in rows[part]() if part in parts else ():
            results.add(part, made)


def preload(folder: Path) -> None:
    """Begin this command anew with the library of faults, which forks inherit."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        environment = {**os.environ, **variables(folder)}
    except pytest.skip.Exception as error:
        raise DrillError(f"{error}; install gcc, or name parts without store and faults") from None
    os.execve(sys.executable, [sys.executable, "-m", "tests.drill", *sys.argv[1:]], environment)


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries that were imported for the forks complain at the end of the interpreter.
    os._exit(ended)
