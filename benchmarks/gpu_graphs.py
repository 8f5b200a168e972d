"""In seconds, whether a device records and replays the diffuser's passes, and what the compiled update takes.

python benchmarks/gpu_graphs.py [--device cpu --small] [--output FILE.json] [eager recomputed compiled update]

The tiny diffuser of four flows: eager, recomputed and compiled, each beside its plain passes. A thread pins memory
meanwhile, as the data's threads do. Then the compiled update beside the separate passes. What fails is printed with its
traceback, and stops nothing else. On a CPU the tests' tape stands for the graphs.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import seconds_of
from torch import Tensor

# The root, whose tests have the tape for a CPU.
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.models.tape import MemoryTape
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.engine.adamw import FlatAdamW, FusedTargets
from vdtrain.engine.deepspeed import EngineSettings
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import Context, Diffuser, DiffuserInput
from vdtrain.models.execution import (
    CudaTape,
    blocks,
    checkpoint_activations,
    compile_blocks,
    plain_passes,
    record_passes,
)
from vdtrain.tracking.surroundings import commit, versions

MODALITIES, BATCH, ROUNDS = ("image", "text"), 2, 3
LATENTS = {"image": (4, 8, 8), "text": (64,)}
# How the passes are executed: name -> (compiled, activation checkpointing).
WAYS = {"eager": (False, "none"), "recomputed": (False, "blocks"), "compiled": (True, "none")}
# Of a gradient's norm: kernels may add in another order, in bf16. Another batch's differ by all of it.
BOUND = 0.02


def batch(number: int, device: torch.device, dtype: torch.dtype) -> list[DiffuserInput]:
    """Inputs of all four flows; each number gives others."""
    generator = torch.Generator(device).manual_seed(number)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    times = torch.arange(2 * BATCH, device=device) * 50 + number
    return [
        DiffuserInput(
            name, drawn(2 * BATCH, *LATENTS[name]), times, [Context(each, drawn(BATCH, 16, 64)) for each in MODALITIES]
        )
        for name in MODALITIES
    ]


def passes(diffuser: Diffuser, inputs: list[DiffuserInput]) -> dict[str, Tensor]:
    """The loss and the gradient of every weight."""
    diffuser.zero_grad()
    loss = torch.stack([predicted.float().square().mean() for predicted in diffuser(inputs)]).sum()
    loss.backward()
    found = {name: each.grad.float() for name, each in diffuser.named_parameters() if each.grad is not None}
    return {"loss": loss.detach(), **found}


def graphs(device: torch.device, dtype: torch.dtype, compiled: bool, checkpointing: str) -> dict[str, Any]:
    """The largest difference between replayed and plain passes of the same code, as a share of the norm."""
    model = to_object(compose("train", ["model=tiny"]), TrainConfig).model
    with device:
        diffuser = Diffuser(model, active_groups(all_flows(list(MODALITIES))))
        for parameter in diffuser.parameters():
            # Layers that start at zero would block the gradients.
            torch.nn.init.normal_(parameter, std=0.05)
    diffuser.to(dtype)
    checkpoint_activations(diffuser, checkpointing)
    if compiled:
        layers = blocks(diffuser.context_layers, diffuser.data_layers)
        compile_blocks(layers, "inductor" if device.type == "cuda" else "aot_eager")
    record_passes(diffuser, CudaTape if device.type == "cuda" else MemoryTape)
    began, largest = time.monotonic(), 0.0
    with pinning(device):
        for number in range(ROUNDS):
            inputs = batch(number, device, dtype)
            with plain_passes(diffuser):
                expected = passes(diffuser, inputs)
            found = passes(diffuser, inputs)
            if expected.keys() != found.keys():
                raise RuntimeError(f"gradients differ in number: {len(expected)}, {len(found)}")
            # A gradient that is nearly 0 is all rounding.
            least = 0.01 * max(float(each.norm()) for each in expected.values())
            apart = (
                float((found[name] - each).norm() / each.norm().clamp(min=least)) for name, each in expected.items()
            )
            largest = max(largest, *apart)
    result = {"seconds": time.monotonic() - began, "largest_difference": largest}
    if largest > BOUND:
        raise RuntimeError(f"replayed passes differ from plain ones: {result}")
    return result


@contextmanager
def pinning(device: torch.device) -> Iterator[None]:
    """Inside, a thread allocates pinned memory, copies it to the GPU and frees it, again and again."""
    done = threading.Event()

    def work() -> None:
        size = 1
        while device.type == "cuda" and not done.is_set():
            size = size % 64 + 1
            torch.empty(size << 16).pin_memory().to(device, non_blocking=True)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def update(device: torch.device, size: int) -> dict[str, Any]:
    """The compiled update beside the separate passes: milliseconds, GB/s, and the largest difference of the masters."""
    settings = EngineSettings(
        zero_stage=1,
        precision="bf16",
        gradient_clip=1.0,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=0.01,
        gradient_scales={},
        gradient_scale_mode="learning_rate",
    )
    generator = torch.Generator(device).manual_seed(0)
    one, true = torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device)
    share = one * 0.01
    masters, actions, gradient = {}, dict[str, Callable[[], object]](), torch.zeros(size, device=device)
    start = torch.randn(size, generator=generator, device=device)
    for name in ("separate", "compiled"):
        masters[name] = start.clone()
        optimizer = FlatAdamW([masters[name]], settings)
        weights, average = start.to(torch.bfloat16), start.clone()

        def separate(optimizer: FlatAdamW = optimizer, weights: Tensor = weights, average: Tensor = average) -> None:
            optimizer.update([gradient], [1e-3], one, true)
            average.lerp_(optimizer.masters[0], share)
            weights.copy_(optimizer.masters[0])
            gradient.zero_()

        targets = FusedTargets([weights], [average], share, clear=True)
        fused = partial(optimizer.update_fused, [gradient], [1e-3], one, true, targets)
        actions[name] = separate if name == "separate" else fused
        gradient.normal_(generator=generator.manual_seed(1))
        actions[name]()
    apart = float((masters["separate"] - masters["compiled"]).norm() / masters["separate"].norm())
    result: dict[str, Any] = {"weights": size, "difference": apart}
    seconds = seconds_of(actions, device, ROUNDS)
    result["milliseconds"] = {name: 1e3 * value for name, value in seconds.items()}
    # Bytes that an element needs; see `FlatAdamW.update_fused`.
    result["gigabytes_a_second"] = {
        name: size * (50 if name == "separate" else 42) / value / 1e9 for name, value in seconds.items()
    }
    if not apart < 1e-6:
        raise RuntimeError(f"the compiled update differs from the separate passes: {result}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="few weights in the update")
    parser.add_argument("--output", type=Path)
    parser.add_argument("checks", nargs="*", help="all by default")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(graphs, device, dtype, *way) for name, way in WAYS.items()
    }
    # Not a multiple of `adamw.WHOLE`: the rest of a buffer is compiled apart.
    checks["update"] = partial(update, device, (1 << 16 if arguments.small else 1 << 28) + 5)
    result: dict[str, Any] = {"versions": versions("torch"), "commit": commit(), "failed": []}
    for name in arguments.checks or checks:
        try:
            result[name] = checks[name]()
            print(name, json.dumps(result[name]), flush=True)
        except Exception:
            traceback.print_exc()
            result[name] = traceback.format_exc()
            result["failed"].append(name)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
