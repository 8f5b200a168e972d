"""Bytes, calls and CPU time of a training step's exchange, by strategy: how often the gradient crosses the network.

python benchmarks/communication.py                 (on 2 and on 4 processes; some minutes on two cores)

Bytes: processes on the CPU train the miniature network in all its flows. What they hand to collectives is counted and
turned into the bytes that a process sends in a bandwidth-optimal algorithm: (N - 1) / N of the tensor for a reduction
to one process, a reduce-scatter or a gather, twice that for an all-reduce. `wire` is their sum in a step, over the
least possible: (gradients once in float32 + weights once in the compute type) x (N - 1) / N. DeepSpeed's own options
stand beside its configuration here. `error` is the largest relative error of a layer group's gradient against ZeRO 0.

CPU time: two processes exchange one large network whose backward is cheap. Each round takes every strategy in turn.
`seconds` is the median CPU time of the step's last backward and update, over that of ZeRO 0 in the same round. Under
gloo, which has no reduce-scatter of its own, a reduce-scatter costs an all-reduce and a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import DEEPSPEED, SHARDED, TrainConfig
from vdtrain.config.validation import stage_flows
from vdtrain.diffusion.objective import Objective, StepRandom
from vdtrain.diffusion.schedule import Schedule
from vdtrain.engine import strategies
from vdtrain.engine.deepspeed import PRECISIONS, EngineSettings, deepspeed_configuration
from vdtrain.engine.engine import Engine
from vdtrain.flows import active_groups
from vdtrain.models.diffuser import Diffuser, parameters_by_group
from vdtrain.models.frozen import FrozenParts, build_frozen
from vdtrain.run import distributed

RESULT = Path(__file__).parent / "results" / "communication.json"
PROCESSES, MICRO_BATCHES, ROWS, RESOLUTION = (2, 4), 3, 2, 32
# Collective -> (whether it reduces, how often the bytes of the whole tensor cross the network).
COLLECTIVES = {
    "allreduce_": (True, 2),
    "reduce_": (True, 1),
    "_reduce_scatter_base_": (True, 1),
    "allgather_": (False, 1),
    "_allgather_base_": (False, 1),
    "allgather_into_tensor_coalesced_": (False, 1),
}
LAYERS, WIDTH, ROUNDS = 8, 1024, 9


@dataclass(frozen=True)
class Contestant:
    """A strategy; `zero` and `top` change DeepSpeed's configuration, `apart` gives every flow a backward of its own."""

    name: str
    stage: int
    exchange: str = DEEPSPEED
    zero: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    apart: bool = False

    def engine(self, module: nn.Module, groups: dict[str, dict[str, nn.Parameter]], precision: str) -> Engine:
        settings = EngineSettings(
            self.stage, precision, 0.0, (0.9, 0.999), 1e-8, 0.0, {}, "learning_rate", exchange=self.exchange
        )
        configuration = {**deepspeed_configuration(settings), **self.top}
        configuration["zero_optimization"].update(self.zero)
        strategies.deepspeed_configuration = lambda _: configuration
        return Engine(module, groups, settings)


CONTESTANTS = (
    Contestant("ZeRO 0", 0),
    Contestant("sharded", 1, SHARDED),
    Contestant("DeepSpeed 1", 1),
    Contestant("DeepSpeed 1, reduced to owners", 1, zero={"use_multi_rank_bucket_allreduce": False}),
    Contestant("DeepSpeed 1, bf16 on the wire", 1, top={"communication_data_type": "bf16"}),
    Contestant("DeepSpeed 2", 2),
    Contestant("DeepSpeed 2, reduced to owners", 2, zero={"use_multi_rank_bucket_allreduce": False}),
    Contestant(
        "DeepSpeed 2, owners, overlapped", 2, zero={"use_multi_rank_bucket_allreduce": False, "overlap_comm": True}
    ),
    Contestant("DeepSpeed 2, one backward per flow", 2, apart=True),
)
TIMED = CONTESTANTS[:4]


class Traffic(TorchDispatchMode):
    """Adds up the bytes that this process hands to collectives, of the whole tensor for a scatter or a gather."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reduced = self.gathered = self.crossing = self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            if name in COLLECTIVES:
                reduces, times = COLLECTIVES[name]
                size = _bytes(args[1] if name == "_reduce_scatter_base_" else args[0])
                self.reduced += size * reduces
                self.gathered += size * (not reduces)
                self.crossing += size * times
                self.calls += 1
            elif name not in ("broadcast_", "barrier"):
                raise ValueError(f"collective {name} is neither a reduction nor a gather known here")
        return function(*args, **(kwargs or {}))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def count(config: TrainConfig, frozen: FrozenParts, contestant: Contestant, precision: str, exact: list[Tensor]) -> Any:
    """Ratios of a step. `exact` takes the first contestant's gradients, with which the later ones are compared."""
    flows = stage_flows(config)
    module = Diffuser(config.model, active_groups(flows))
    groups = {group: parameters_by_group(module)[group] for group in active_groups(flows)}
    torch.manual_seed(0)
    for parameter in module.parameters():
        # Some layers start at zero, and those before them would have no gradient.
        nn.init.normal_(parameter, std=0.05)
    engine = contestant.engine(module, groups, precision)
    frozen.to(engine.compute_dtype)
    schedule = Schedule(config.model.schedule, torch.device("cpu"))
    together = Objective(flows, schedule, frozen, config.objective)
    apart = [Objective([flow], schedule, frozen, config.objective) for flow in flows]
    parts = apart if contestant.apart else [together]
    samples = {"image": torch.zeros(ROWS, 3, RESOLUTION, RESOLUTION, dtype=torch.uint8), "text": ["a circle"] * ROWS}
    with Traffic() as traffic:
        for index in range(MICRO_BATCHES):
            first = (distributed.rank() * MICRO_BATCHES + index) * ROWS
            pairs = distributed.world_size() * MICRO_BATCHES * ROWS
            rng = StepRandom("0", 0, pairs, slice(first, first + ROWS), torch.device("cpu"))
            encoded = together.encode(samples, RESOLUTION, rng)
            for objective in parts:
                loss = objective.total(objective.losses(engine, encoded, rng)) / MICRO_BATCHES
                engine.backward(loss, last=index == MICRO_BATCHES - 1 and objective is parts[-1])
        engine.step(1e-4)
    # After one step AdamW's first moments are a tenth of the gradients.
    gradients = [partition.exp_avg.clone() for partition in engine.partitions()]
    engine.close()
    exact[:] = exact or gradients
    errors = torch.stack([(own - true).square().sum() for own, true in zip(gradients, exact, strict=True)])
    sizes = torch.stack([true.square().sum() for true in exact])
    dist.all_reduce(errors)
    dist.all_reduce(sizes)
    elements = sum(parameter.numel() for parameters in groups.values() for parameter in parameters.values())
    weight = engine.compute_dtype.itemsize
    return {
        "strategy": contestant.name,
        "precision": precision,
        "processes": distributed.world_size(),
        "reduced": round(traffic.reduced / (4 * elements), 4),
        "gathered": round(traffic.gathered / (weight * elements), 4),
        "wire": round(traffic.crossing / ((4 + weight) * elements), 4),
        "calls": traffic.calls,
        "error": float(f"{float((errors / sizes).max().sqrt()):.1e}"),
    }


class Cheap(nn.Module):
    """Large weights and next to no computation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(LAYERS)])

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([(inputs @ layer).float().square().mean() for layer in self.layers]).sum()


def seconds(precision: str) -> list[dict[str, Any]]:
    """CPU seconds of the exchange and update, in turn."""
    engines = {}
    for contestant in TIMED:
        module = Cheap()
        halves = [dict(list(module.named_parameters())[half::2]) for half in (0, 1)]
        engines[contestant.name] = contestant.engine(module, dict(zip(("one", "two"), halves, strict=True)), precision)
    taken: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS + 2):
        for name, engine in engines.items():
            inputs = torch.ones(1, WIDTH, dtype=engine.compute_dtype)
            engine.backward(engine(inputs), last=False)
            loss = engine(inputs)
            dist.barrier()
            began = time.process_time()
            engine.backward(loss, last=True)
            engine.step(1e-4)
            # The weights have arrived.
            _ = engine.module
            taken[name].append(time.process_time() - began)
    for engine in engines.values():
        engine.close()
    first = taken[TIMED[0].name][2:]
    rows = []
    for name, values in taken.items():
        ratios = sorted(value / base for value, base in zip(values[2:], first, strict=True))
        spread = [round(ratios[len(ratios) // 4], 2), round(ratios[-1 - len(ratios) // 4], 2)]
        rows.append({"strategy": name, "precision": precision, "seconds": round(statistics.median(ratios), 2)})
        rows[-1]["quartiles"] = spread
    return rows


def work(rank: int, processes: int, folder: str) -> None:
    """One of the processes; the first one prints and writes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{processes}", rank=rank, world_size=processes)
    config = to_object(compose("train", ["model=tiny", "hardware=cpu", "stage=stage3_four_flow"]), TrainConfig)
    frozen = build_frozen(config.model)
    result: dict[str, Any] = {"bytes": [], "cpu": []}
    for precision in PRECISIONS:
        exact: list[Tensor] = []
        for contestant in CONTESTANTS:
            row = count(config, frozen, contestant, precision, exact)
            result["bytes"].append(row)
            if rank == 0:
                print(json.dumps(row), flush=True)
        if processes == PROCESSES[0]:
            result["cpu"] += seconds(precision)
            if rank == 0:
                print(json.dumps(result["cpu"][-len(TIMED) :]), flush=True)
    distributed.finish()
    if rank == 0:
        (Path(folder) / f"{processes}.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes, calls and CPU time of a training step's exchange")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON with the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for processes in PROCESSES:
            spawn(work, (processes, folder), nprocs=processes)
        parts = [json.loads((Path(folder) / f"{processes}.json").read_text()) for processes in PROCESSES]
    result = {
        "claim": "sharded sends the least bytes: gradients once a step, weights once",
        "micro_batches": MICRO_BATCHES,
        "bytes": [row for part in parts for row in part["bytes"]],
        "cpu": parts[0]["cpu"],
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
