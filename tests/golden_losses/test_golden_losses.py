"""Training computes what it computed when the losses were recorded (README.md here)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.golden_losses.record import STAGES, STEPS, read
from tests.programs import program
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig

ROOT = Path(__file__).parents[2]
# Four times what other threads and processors were seen to do, and a tenth of what 1 % of learning rate does.
TOLERANCE = 3e-4


def test_losses_are_those_recorded(tmp_path: Path) -> None:
    command = [program("python"), "-m", "tests.golden_losses.record", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for stage, recorded in read().items():
        found = json.loads((tmp_path / f"{stage}.json").read_text())
        assert found.keys() == recorded.keys()
        for flow, losses in recorded.items():
            assert found[flow] == pytest.approx(losses, rel=TOLERANCE), f"{stage}, {flow}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_of_every_flow_is_recorded_and_they_learn(stage: str) -> None:
    recorded = read()[stage]
    assert list(recorded) == to_object(compose("train", [f"stage={stage}"]), TrainConfig).stage.flows
    for losses in recorded.values():
        assert len(losses) == STEPS
    first = recorded["image-to-image"]
    assert stage != STAGES[0] or sum(first[-5:]) < 0.5 * sum(first[:5])
