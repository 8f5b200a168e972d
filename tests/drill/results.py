"""The results of the drill, which grow part by part, and the page that shows them."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.drill.kills import KINDS

ROOT = Path(__file__).parents[2]
RESULT, PAGE = ROOT / "benchmarks" / "results" / "drill.json", ROOT / "docs" / "reliability.md"
TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end -->)", re.DOTALL)
HEAD = ("fault", "tries", "outcome", "lost", "repeated", "time to recover")


def machine() -> str:
    """The processor, how much of it there is, and the memory."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 1e9
    return f"{found[1] if found else 'unknown processor'}, {cores} cores, {memory:.0f} GB of memory"


class Results:
    """What was held so far, in a JSON file that is written after every change.

    Args:
        seed: of the random kills; runs of another seed are left out.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.seed = path, seed

    def read(self) -> dict[str, Any]:
        """machine, seed, runs (`tests.drill.kills.Run.record`), faults: by part, rows of the table (`row`)."""
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        runs = found["runs"] if found.get("seed") == self.seed else []
        return {"machine": machine(), "seed": self.seed, "runs": runs, "faults": found.get("faults", {})}

    def kills(self) -> int:
        """How many there were."""
        return sum(len(run["kills"]) for run in self.read()["runs"])

    def add_run(self, run: dict[str, Any]) -> None:
        """Keep a run."""
        result = self.read()
        self._write(result | {"runs": [*result["runs"], run]})

    def add(self, part: str, made: dict[str, Any]) -> None:
        """Keep a row of a part, in the place of an earlier one of the same fault."""
        result = self.read()
        rows = {each["fault"]: each for each in result["faults"].get(part, [])} | {made["fault"]: made}
        self._write(result | {"faults": result["faults"] | {part: list(rows.values())}})
        print(f"{part}: {made['fault']}: {made['outcome']}", flush=True)

    def _write(self, result: dict[str, Any]) -> None:
        """A line for each run and row."""
        parts = [f"  {json.dumps(part)}: [\n{_lines(rows, 3)}\n  ]" for part, rows in result["faults"].items()]
        lines = [
            f' "machine": {json.dumps(result["machine"])}',
            f' "seed": {result["seed"]}',
            ' "runs": [\n' + _lines(result["runs"], 2) + "\n ]",
            ' "faults": {\n' + ",\n".join(parts) + "\n }",
        ]
        draft = self.path.with_suffix(".tmp")
        draft.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        draft.replace(self.path)


def row(
    fault: str,
    tries: int,
    outcome: str,
    held: bool,
    lost: int | None = None,
    repeated: int | None = None,
    seconds: Sequence[float] = (),
) -> dict[str, Any]:
    """A row of the table; `lost` and `repeated` are None where no samples are read."""
    return locals() | {"seconds": list(seconds)}


def _lines(records: Sequence[Any], indent: int) -> str:
    return ",\n".join(" " * indent + json.dumps(record) for record in records)


def kills(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All kills of a result, each with its run."""
    return [{**kill, "run": run} for run in result["runs"] for kill in run["kills"]]


def held(result: dict[str, Any]) -> bool:
    """Whether nothing went wrong."""
    runs = all(run["equal"] and not (run["lost"] or run["repeated"] or run["faults"]) for run in result["runs"])
    return runs and all(row["held"] for rows in result["faults"].values() for row in rows)


def text(result: dict[str, Any]) -> str:
    """What the page shows of a result."""
    runs, all_kills = result["runs"], kills(result)
    equal = sum(run["equal"] for run in runs)
    starts = sum(run["starts"] for run in runs)
    fresh = sum(kill["fresh"] for kill in all_kills)
    head = (
        f"{result['machine']}. {len(all_kills)} kills in {len(runs)} runs of three stages and {starts} starts. {fresh} "
        f"of the killed starts were of real interpreters under torchrun, the others forks of one that had imported "
        f"everything. {equal} of {len(runs)} runs ended bit for bit like the undisturbed one; samples lost: "
        f"{sum(run['lost'] for run in runs)}, repeated: {sum(run['repeated'] for run in runs)}.\n"
    )
    rows = [HEAD, ("---", "---:", "---", "---:", "---:", "---:")]
    for whom, when in KINDS:
        own = [kill for kill in all_kills if (kill["whom"], kill["when"]) == (whom, when)]
        if own:
            good = sum(kill["run"]["equal"] and kill["ended"] is not None for kill in own)
            outcome = "equal bit for bit" if good == len(own) else f"equal bit for bit {good} times"
            runs_of = {kill["run"]["number"]: kill["run"] for kill in own}.values()
            lost, repeated = (sum(run[what] for run in runs_of) for what in ("lost", "repeated"))
            seconds = [kill["recovered"] for kill in own if kill["recovered"] is not None]
            rows.append((f"SIGKILL of {whom.replace('launcher', 'the launcher')} {when}", str(len(own)), outcome))
            rows[-1] += (str(lost), str(repeated), _times(seconds))
    for part in result["faults"].values():
        for row in part:
            numbers = ("-" if row[what] is None else str(row[what]) for what in ("lost", "repeated"))
            rows.append((row["fault"], f"{row['tries']:,}", row["outcome"], *numbers, _times(row["seconds"])))
    return head + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _times(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    return f"{statistics.median(seconds):.1f} s, at most {max(seconds):.1f} s"


def write_page(result: dict[str, Any]) -> None:
    """Put the table into the page."""
    PAGE.write_text(TABLE.sub(lambda _: text(result), PAGE.read_text()))
