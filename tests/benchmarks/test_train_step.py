"""benchmarks/train_step.py as typed, at its smallest: contestants do the same work, and every figure is there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import train_step

from tests.programs import program

pytestmark = pytest.mark.slow
SCRIPT = Path(train_step.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What the command printed, and what it wrote."""
    output = tmp_path_factory.mktemp("train_step") / "results.json"
    command = [program("python"), str(SCRIPT), "--smoke", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(output.read_text())


def test_contestants_do_the_same_work(results: tuple[str, dict[str, Any]]) -> None:
    _, found = results
    assert list(found["contestants"]) == list(train_step.SMOKE_CONTESTANTS)
    assert 0 < found["largest_output_difference"] < train_step.OUTPUT_TOLERANCE
    for row in found["contestants"].values():
        assert row["parameters"] == found["parameters"] > 1_000_000
        assert row["loss_difference"] < train_step.LOSS_TOLERANCE
        assert row["peak_bytes"] > 16 * row["parameters"]
        for part in ("flows", "step"):
            for kind in ("seconds", "cpu_seconds"):
                assert row[part][kind]["median"] > 0
                assert row[part][f"peer_over_own_{kind}"]["median"] > 0
    assert found["contestants"][train_step.PEER]["step"]["peer_over_own_seconds"]["median"] == 1
    assert {"processor", "cores", "threads"} <= found["hardware"].keys()
    assert {"python", "torch", "diffusers", "deepspeed"} <= found["versions"].keys()
    assert found["left_out"] == {}


def test_tables(results: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed, found = results
    path = tmp_path / "results.json"
    path.write_text(json.dumps(found))
    assert train_step.main(["--show", "--output", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() in printed
    for name in train_step.SMOKE_CONTESTANTS:
        assert f"| {train_step.CONTESTANTS[name]} | " in shown


def test_contestants_of_other_work_are_told() -> None:
    own, peer = [{"a": 1.0, "b": 2.0}], [{"a": 1.0, "b": 2.5}]
    assert train_step._loss_difference(own, peer) == pytest.approx(0.2)
    assert train_step._loss_difference(own, own) == 0


def test_every_rung_is_a_contestant() -> None:
    assert set(train_step.LADDER) <= set(train_step.CONTESTANTS)
    assert set(train_step.COMPILED) <= set(train_step.CONTESTANTS)
    plain, eager = (
        {"step": {"seconds": {"median": 2.0}, "peer_over_own_seconds": {"median": ratio}}} for ratio in (1.5, 3.0)
    )
    rows = train_step.ladder({"plain": plain, "eager": eager})
    assert [each["plain_over_own"] for each in rows] == [1.0, 2.0]
