"""Twenty random kills, as `make drill` holds them by the hundred; and that the drill can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.drill.kills import KINDS
from tests.drill.others import audited
from tests.drill.results import PAGE, RESULT, ROOT, Results, held, kills, row, text
from tests.drill.runs import BATCH, LOW, STEPS, End, Stage
from tests.drill.soak import growth
from tests.programs import program


def drill(python: str, folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    result = folder / "drill.json"
    command = [python, "-m", "tests.drill", *words, "--folder", str(folder / "drill"), "--result", str(result)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=570), result


# tests/training/test_resume.py has every way to stop in `make test`.
@pytest.mark.slow
def test_twenty_random_kills_lose_nothing(tmp_path: Path) -> None:
    done, path = drill(program("python"), tmp_path, "kills", "--kills", "20", "--runs", "2", "--fresh", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert len(kills(result)) == 20
    assert {(kill["whom"], kill["when"]) for kill in kills(result)} <= set(KINDS)
    for run in result["runs"]:
        assert (run["equal"], run["lost"], run["repeated"], run["faults"]) == (True, 0, 0, [])
        assert all(kill["ended"] is not None for kill in run["kills"])
    assert text(result) in done.stdout
    # Every one that was killed went on.
    assert sum(run["starts"] for run in result["runs"]) >= 20 + 3 * len(result["runs"])


@pytest.mark.slow
def test_file_operations_and_faults_by_the_shim(tmp_path: Path) -> None:
    done, path = drill(sys.executable, tmp_path, "faults", "--tries", "1", "--only", "disk")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["faults"]["faults"]
    assert len(rows) == 3
    assert all((each["held"], each["lost"], each["repeated"]) == (True, 0, 0) for each in rows)


def test_a_part_that_is_not_one_is_named(tmp_path: Path) -> None:
    done, _ = drill(program("python"), tmp_path, "everything")
    assert done.returncode == 2
    assert "no part everything; choose from kills, store" in done.stderr


def test_the_page_shows_the_recorded_figures() -> None:
    result = json.loads(RESULT.read_text())
    assert text(result) in PAGE.read_text()
    assert held(result)
    assert f"{len(kills(result))} kills in " in text(result)


def diary(folder: Path, start: int, rank: int, steps: range) -> None:
    lines = []
    for step in steps:
        phase, place = divmod(step, LOW) if step < LOW else (1, step - LOW)
        positions = [place * BATCH + rank * 2 + each for each in range(2)]
        lines.append(json.dumps({"seed": phase, "positions": positions, "rows": [f"0/{each}" for each in positions]}))
    # A kill in the middle of a line.
    (folder / f"stage1_single_flow-{start}-{rank}").write_text("\n".join([*lines, '{"seed": 0, "pos']))


@pytest.mark.parametrize(
    ("first", "second", "lost", "repeated"),
    [
        (range(4), range(3, STEPS), 0, 0),
        (range(3), range(3, STEPS), 0, 0),
        # The second start began too late, or left a step out.
        (range(3), range(4, STEPS), BATCH, 0),
        (range(4), range(3, STEPS - 1), BATCH, 0),
    ],
)
def test_samples_are_counted_from_start_to_start(
    tmp_path: Path, first: range, second: range, lost: int, repeated: int
) -> None:
    stage = Stage(tmp_path, tmp_path, 0)
    stage.starts = [None, None]  # type: ignore[list-item]
    for start, steps in enumerate((first, second)):
        for rank in range(2):
            diary(tmp_path, start, rank, steps)
    found = End({}, (), [], stage.trained())
    for path in tmp_path.glob("stage1*"):
        path.unlink()
    for rank in range(2):
        diary(tmp_path, 0, rank, range(STEPS))
    expected = End({}, (), [], stage.trained())
    assert expected.samples.total() == STEPS * BATCH
    assert (found.lost(expected), found.repeated(expected)) == (lost, repeated)


def test_a_sample_that_is_read_twice_is_repeated() -> None:
    once, twice = (End({}, (), [], Counter({(0, 1, "0/1"): times})) for times in (1, 2))
    assert (twice.repeated(once), twice.lost(once), once.lost(twice)) == (1, 0, 1)
    assert not End({"a": "1"}, (), [], once.samples).same_bits(End({"a": "2"}, (), [], once.samples))


def test_results_are_kept_row_by_row_and_tell_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path / "drill.json", seed=3)
    kill = {"whom": "one rank", "when": "while saving", "stage": 1, "step": 2, "fresh": True}
    run = {"number": 0, "kills": [{**kill, "ended": 1.0, "recovered": 2.5}], "starts": 4, "equal": True}
    run |= {"lost": 0, "repeated": 0, "faults": []}
    results.add_run(run)
    results.add("faults", row("odd", 1, "broken", held=False))
    assert not held(results.read())
    results.add("faults", row("odd", 2, "goes on", held=True, lost=0, repeated=0, seconds=[1.0, 3.0, 2.0]))
    assert held(results.read())
    shown = text(results.read())
    assert "| SIGKILL of one rank while saving | 1 | equal bit for bit | 0 | 0 | 2.5 s, at most 2.5 s |" in shown
    assert "| odd | 2 | goes on | 0 | 0 | 2.0 s, at most 3.0 s |" in shown
    results.add_run(run | {"number": 1, "lost": 4})
    assert not held(results.read())
    # Kills of another seed begin anew; the rows stay.
    other = Results(tmp_path / "drill.json", seed=4)
    assert (other.kills(), len(other.read()["faults"]["faults"])) == (0, 1)


def test_growth_is_the_median_slope_whatever_single_points_are() -> None:
    assert growth([[1000, 50.0], [2000, 51.5], [3000, 53.0]]) == pytest.approx(1.5)
    assert growth([[1000, 50.0], [2000, 52.0], [3000, 50.0]]) == pytest.approx(0.0)
    assert growth([[1000, 50.0], [2000, 50.5], [3000, 51.0], [4000, 51.5], [5000, 92.0]]) == pytest.approx(0.5)


def test_packages_that_were_not_looked_up_are_not_without_holes() -> None:
    unknown = {"name": "a", "skip_reason": "not found"}
    clean, holed = {"name": "b", "version": "1", "vulns": []}, {"name": "c", "version": "2", "vulns": [{"id": "CVE-1"}]}
    found = [audited(packages) for packages in ([unknown], [unknown, clean], [clean, holed])]
    assert [each["tries"] for each in found] == [0, 1, 2]
    assert [each["held"] for each in found] == [True, True, False]
    assert found[0]["outcome"].startswith("skipped")
    assert "1 more packages" in found[1]["outcome"]
    assert found[2]["outcome"] == "c 2: CVE-1"
