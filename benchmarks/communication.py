"""Bytes that a training step reduces, over the bytes of the gradient: how often it crosses the network.

python benchmarks/communication.py                 (ZeRO 0, 1 and 2; `--stages 0` needs no DeepSpeed)

Two processes on the CPU train the miniature network in all its flows. Counted is what they hand to reductions in a
step; the least possible is the gradient once, in float32, whatever the number of flows and of micro-batches.
Beside the trainer's way, one backward for all flows of a micro-batch, stands one backward per flow. What ZeRO gathers
afterwards are weights, counted by themselves; an all-reduce moves the bytes handed to it twice, a gather once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import stage_flows
from vdtrain.diffusion.objective import Objective, StepRandom
from vdtrain.diffusion.schedule import Schedule
from vdtrain.engine.engine import Engine, EngineSettings
from vdtrain.flows import active_groups
from vdtrain.models.diffuser import Diffuser, parameters_by_group
from vdtrain.models.frozen import FrozenParts, build_frozen
from vdtrain.run import distributed

RESULT = Path(__file__).parent / "results" / "communication.json"
PROCESSES, MICRO_BATCHES, ROWS, RESOLUTION = 2, 3, 2, 32
TOGETHER, APART = "all flows together", "one backward per flow"
REDUCTIONS = ("allreduce_", "reduce_", "reduce_scatter_", "_reduce_scatter_base_", "allreduce_coalesced_")
GATHERS = ("allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_")


class Traffic(TorchDispatchMode):
    """Adds up the bytes that this process hands to collectives, of the whole row for a gather."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reduced = self.gathered = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            if name in REDUCTIONS:
                self.reduced += _bytes(args[1] if name == "_reduce_scatter_base_" else args[0])
            elif name in GATHERS:
                self.gathered += _bytes(args[0])
            elif name not in ("broadcast_", "barrier"):
                raise ValueError(f"collective {name} is neither a reduction nor a gather known here")
        return function(*args, **(kwargs or {}))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def measure(config: TrainConfig, frozen: FrozenParts, stage: int, precision: str, way: str) -> dict[str, Any]:
    """Ratios of a step under a ZeRO stage."""
    flows = stage_flows(config)
    module = Diffuser(config.model, active_groups(flows))
    groups = {group: parameters_by_group(module)[group] for group in active_groups(flows)}
    elements = sum(parameter.numel() for parameters in groups.values() for parameter in parameters.values())
    settings = EngineSettings(stage, precision, 1.0, (0.9, 0.999), 1e-8, 0.0, {}, "learning_rate")
    engine = Engine(module, groups, settings)
    frozen.to(engine.compute_dtype)
    schedule = Schedule(config.model.schedule, torch.device("cpu"))
    together = Objective(flows, schedule, frozen, config.objective)
    parts = [together] if way == TOGETHER else [Objective([flow], schedule, frozen, config.objective) for flow in flows]
    samples = {"image": torch.zeros(ROWS, 3, RESOLUTION, RESOLUTION, dtype=torch.uint8), "text": ["a circle"] * ROWS}
    with Traffic() as traffic:
        for index in range(MICRO_BATCHES):
            first = (distributed.rank() * MICRO_BATCHES + index) * ROWS
            rows = slice(first, first + ROWS)
            rng = StepRandom("0", 0, PROCESSES * MICRO_BATCHES * ROWS, rows, torch.device("cpu"))
            encoded = together.encode(samples, RESOLUTION, rng)
            for objective in parts:
                loss = objective.total(objective.losses(engine, encoded, rng)) / MICRO_BATCHES
                engine.backward(loss, last=index == MICRO_BATCHES - 1 and objective is parts[-1])
        engine.step(1e-4)
    engine.close()
    return {
        "zero_stage": stage,
        "precision": precision,
        "way": way,
        "reduced": round(traffic.reduced / (4 * elements), 4),
        "gathered": round(traffic.gathered / (settings.compute_dtype.itemsize * elements), 4),
    }


def work(rank: int, stages: list[int], folder: str, output: Path) -> None:
    """One of the processes; the first one prints and writes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    config = to_object(compose("train", ["model=tiny", "hardware=cpu", "stage=stage3_four_flow"]), TrainConfig)
    frozen = build_frozen(config.model)
    rows = []
    for stage in stages:
        for precision, way in (("fp32", TOGETHER), ("bf16", TOGETHER), ("fp32", APART)):
            row = measure(config, frozen, stage, precision, way)
            rows.append(row)
            if rank == 0:
                print(
                    f"ZeRO {stage}, {precision}, {way}: gradient reduced {row['reduced']:.2f} times (least 1), "
                    f"weights gathered {row['gathered']:.2f} times",
                    flush=True,
                )
    distributed.finish()
    if rank == 0:
        result = {
            "claim": "one reduction for all flows: per step under ZeRO 0 and 1, per micro-batch under ZeRO 2",
            "flows": len(stage_flows(config)),
            "micro_batches": MICRO_BATCHES,
            "processes": PROCESSES,
            "ratios": rows,
            "versions": {name: version(name) for name in ("torch", *(["deepspeed"] if set(stages) - {0} else []))},
            "machine": f"{platform.machine()}, {PROCESSES} of its cores",
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes reduced per training step, over the bytes of the gradient")
    parser.add_argument("--stages", type=int, nargs="+", choices=[0, 1, 2], default=[0, 1, 2], help="ZeRO stages")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON with the ratios")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (arguments.stages, folder, arguments.output), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
