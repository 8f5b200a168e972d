"""What averaged weights cost: an update of this process's piece, beside an AdamW step and a full-tensor average.

python benchmarks/ema.py [--device cuda]        # writes benchmarks/results/ema.json

Every process averages its own piece of the float32 master weights and nothing else. A full-tensor average, the peer,
keeps all weights on every process, one tensor to a parameter. The AdamW step is PyTorch's fused one over the same
piece. Needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timing import seconds_of
from torch import Tensor

from vdtrain.engine.engine import ShardEMA
from vdtrain.engine.flat import GroupLayout, ParameterSlot, Partition

RESULTS = Path(__file__).parent / "results"
GROUPS = ("global", "data.image", "context.image", "context.text")
DECAY = 0.9999


def measure(device: torch.device, parameters: int, processes: int, rounds: int) -> dict[str, Any]:
    piece = parameters // processes // len(GROUPS)
    partitions = []
    for group in GROUPS:
        layout = GroupLayout(group, (ParameterSlot(f"{group}.weight", (piece,), 0),))
        rows = [torch.rand(piece, device=device) for _ in range(3)]
        partitions.append(Partition(layout, 0, piece, *rows))
    engine: Any = SimpleNamespace(partitions=lambda: partitions)
    ema = ShardEMA(engine, DECAY)
    applied = torch.ones((), dtype=torch.bool, device=device)

    masters = [torch.nn.Parameter(torch.rand(piece, device=device)) for _ in GROUPS]
    for master in masters:
        master.grad = torch.rand_like(master)
    optimizer = torch.optim.AdamW(masters, fused=True)

    # Tensors as large as a middling layer of the full-size model.
    whole: list[Tensor] = [torch.rand(1 << 20, device=device) for _ in range(parameters >> 20)]
    averages = [tensor.clone() for tensor in whole]

    def full_tensor_update() -> None:
        torch._foreach_lerp_(averages, whole, 1 - DECAY)

    def step() -> None:
        optimizer.step()

    taken = seconds_of(
        {"ema": lambda: ema.update(applied), "adamw": step, "full_tensor_ema": full_tensor_update}, device, rounds
    )
    return {
        "parameters": parameters,
        "processes": processes,
        "milliseconds": {name: round(1e3 * value, 3) for name, value in taken.items()},
        "ema_over_adamw_step": round(taken["ema"] / taken["adamw"], 3),
        "ema_over_full_tensor_ema": round(taken["ema"] / taken["full_tensor_ema"], 3),
        "bytes_per_process": sum(row.nbytes for row in ema.rows),
        "bytes_per_process_full_tensor": sum(tensor.nbytes for tensor in averages),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parameters", type=int, default=1 << 28)
    parser.add_argument("--processes", type=int, default=8, help="among which the weights are cut")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result = {
        "claim": "an average costs a process its share of the weights, and a fraction of its optimiser step",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **measure(device, arguments.parameters, arguments.processes, arguments.rounds),
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    print(json.dumps(result, indent=2))
    (RESULTS / f"ema{'_cuda' if device.type == 'cuda' else ''}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
