"""Trains the three stages for 30 steps each and writes every flow's loss of every step, a file to a stage.

python -m tests.golden_losses.record
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
STAGES = ("stage1_single_flow", "stage2_dual_flow", "stage3_four_flow")
STEPS = 30
# A step has two micro-batches; a stage has both its resolutions.
SETTINGS = (
    "model=tiny",
    "data=shapes",
    "hardware=cpu",
    "hardware.micro_batch_size={32:4,64:4}",
    "tracking=none",
    "stage.global_batch_size=8",
    "stage.phases=[{resolution:32,samples:160},{resolution:64,samples:80}]",
    "optimizer.warmup_samples=80",
    "log_every_steps=1",
    "checkpoint.every_steps=1000",
    "checkpoint.keep=1",
)

# Loss of every step, by flow.
Curves = dict[str, list[float]]


def record(folder: Path, *overrides: str) -> dict[str, Curves]:
    """Train in `folder`, each stage from the one before; the losses by stage."""
    from tests.pairs import write_pairs
    from vdtrain.commands.train import main
    from vdtrain.tracking.metrics import read_metrics

    manifest = write_pairs(folder / "data")
    curves: dict[str, Curves] = {}
    for stage in STAGES:
        places = [f"stage={stage}", f"data.manifest={manifest}", f"runs_dir={folder}/runs"]
        status = main([*SETTINGS, *places, *overrides])
        if status != 0:
            raise RuntimeError(f"{stage} ended with {status}")
        records = [record["loss"] for record in read_metrics(folder / "runs" / stage)]
        curves[stage] = {flow: [losses[flow] for losses in records] for flow in records[0]}
    return curves


def read() -> dict[str, Curves]:
    """The losses as they were recorded."""
    return {stage: json.loads((HERE / f"{stage}.json").read_text()) for stage in STAGES}


def write(folder: Path, curves: dict[str, Curves]) -> None:
    """A file to a stage, seven digits to a loss."""
    for stage, flows in curves.items():
        lines = [f'  "{flow}": [{", ".join(f"{loss:.7g}" for loss in losses)}]' for flow, losses in flows.items()]
        (folder / f"{stage}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    with tempfile.TemporaryDirectory() as folder:
        write(target, record(Path(folder), *sys.argv[2:]))
