"""What a device does with the operators that decide a step's time: rates, errors and the kernel that is taken.

python benchmarks/gpu_probes.py [--device cpu --small] [--output FILE.json]

Attention: every backend of PyTorch at the head sizes and numbers of keys that the model has, forward and backward,
beside the plain mathematical one in float32. Convolutions of 3x3 in both memory layouts, group norm with SiLU eager and
compiled, and a matrix product, whose rate is the limit. Each line is printed as it is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import seconds_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdtrain.tracking.surroundings import commit, processor, versions

RESULT = Path(__file__).parent / "results" / "gpu" / "probes.json"
BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
KEYS = (1024, 256, 77, 257, 4)
# Heads, head size, queries, keys: the levels' head sizes, with keys of self-attention at 256 pixels, of the contexts,
# and of a text state. Text states read context tokens by 8 x 4 queries as wide as a token (`reads_tokens`).
ATTENTIONS = [
    *((8, size, max(keys, 16) if keys in (1024, 256, 4) else 256, keys) for size in (40, 80, 160) for keys in KEYS),
    *((1, 768, 32, keys) for keys in (77, 257)),
]
# Channels and side of the state at 256 pixels.
CONVOLUTIONS = ((320, 32), (640, 16), (1280, 8))
NORM_GROUPS = 32


def attention(device: torch.device, dtype: torch.dtype, batch: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each of ATTENTIONS and each backend, and for the backend that PyTorch itself takes."""
    generator = torch.Generator(device).manual_seed(0)
    for heads, size, queries, keys in ATTENTIONS:
        shapes = ((batch, heads, queries, size), (batch, heads, keys, size), (batch, heads, keys, size))
        inputs = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        given = torch.randn(shapes[0], generator=generator, device=device)
        with sdpa_kernel(SDPBackend.MATH):
            exact = _both_ways([each.to(dtype).float() for each in inputs], given.to(dtype).float())
        for name in ("default", *BACKENDS):
            row = {"part": "attention", "head": size, "queries": queries, "keys": keys, "backend": name}
            own = [each.to(dtype) for each in inputs]
            try:
                with sdpa_kernel(list(BACKENDS.values()) if name == "default" else BACKENDS[name]):
                    found = _both_ways(own, given.to(dtype))
                    action = _action(own, given.to(dtype))
                    row["milliseconds"] = 1e3 * seconds_of({name: action}, device, rounds)[name]
            except RuntimeError as error:
                yield row | {"refused": str(error).partition("\n")[0][:120]}
                continue
            errors = [
                float((mine.float() - true).abs().max() / true.abs().max())
                for mine, true in zip(found, exact, strict=True)
            ]
            yield row | {"forward_error": errors[0], "backward_error": max(errors[1:])}


def _both_ways(inputs: Sequence[Tensor], given: Tensor) -> list[Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    out = F.scaled_dot_product_attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, given)]


def _action(inputs: Sequence[Tensor], given: Tensor) -> Callable[[], object]:
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    return lambda: torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, given)


def convolutions(device: torch.device, dtype: torch.dtype, batch: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Forward and backward of 3x3 convolutions, NCHW and channels_last."""
    for channels, side in CONVOLUTIONS:
        seconds = {}
        for layout in (torch.contiguous_format, torch.channels_last):
            layer = torch.nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)
            layer.to(memory_format=layout)
            state = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=layout)
            action = _layer_action(layer, state)
            seconds[str(layout).removeprefix("torch.")] = seconds_of({"": action}, device, rounds)[""]
        operations = 3 * 2 * 9 * channels**2 * side**2 * batch
        yield {
            "part": "convolution",
            "channels": channels,
            "side": side,
            "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
            "teraflops": {name: operations / value / 1e12 for name, value in seconds.items()},
        }


def norms(
    device: torch.device, dtype: torch.dtype, batch: int, rounds: int, sizes: Sequence[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """Forward and backward of group norm and SiLU, eager and compiled, in both layouts."""
    # A version for every shape and layout.
    torch._dynamo.config.recompile_limit = 64
    for channels, side in sizes:
        layer = torch.nn.Sequential(torch.nn.GroupNorm(NORM_GROUPS, channels), torch.nn.SiLU()).to(device, dtype)
        seconds, difference = {}, 0.0
        for layout in (torch.contiguous_format, torch.channels_last):
            state = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=layout)
            compiled = torch.compile(layer, dynamic=False)
            state.requires_grad_()
            difference = max(difference, float((compiled(state) - layer(state)).detach().abs().max()))
            actions = {"eager": _layer_action(layer, state), "compiled": _layer_action(compiled, state)}
            name = str(layout).removeprefix("torch.")
            seconds |= {f"{kind}, {name}": value for kind, value in seconds_of(actions, device, rounds).items()}
        yield {
            "part": "group norm and SiLU",
            "channels": channels,
            "side": side,
            "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
            "largest_difference": difference,
        }


def _layer_action(layer: Callable[[Tensor], Tensor], state: Tensor) -> Callable[[], object]:
    leaf = state.detach().requires_grad_()
    given = torch.randn_like(state)

    def action() -> None:
        leaf.grad = None
        layer(leaf).backward(given)

    return action


def product(device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> Iterator[dict[str, Any]]:
    """The rate of a square matrix product of random numbers."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = seconds_of({"": lambda: left @ right}, device, rounds)[""]
    yield {"part": "matrix product", "size": size, "teraflops": 2 * size**3 / seconds / 1e12}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a small batch, once")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch, rounds, size = (2, 1, 256) if arguments.small else (64, 10, 8192)
    on_gpu = device.type == "cuda"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "versions": versions("torch") | {"cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda},
        "commit": commit(),
        "rows": [],
    }
    began = time.monotonic()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    shape = (device, dtype, batch, rounds)
    sides = CONVOLUTIONS[-1:] if arguments.small else CONVOLUTIONS
    # The last one compiles, so that a failure or a time limit leaves the others.
    for rows in (product(device, dtype, size, rounds), convolutions(*shape), attention(*shape), norms(*shape, sides)):
        for row in rows:
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
            result["seconds"] = round(time.monotonic() - began, 1)
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
