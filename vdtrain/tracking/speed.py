"""Meters of a step's speed: the time of its parts, its floating-point operations, and the device's own rates.

None of them waits for the device while a step runs, except `OperatorCount` with a clock.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Parts of a step, as the trainer marks them.
ENCODE, FORWARD, BACKWARD, OPTIMISER = PARTS = ("encode", "forward", "backward", "optimiser")
EXCHANGE = "exchange"
# Ends no part: its time belongs to the part that ends next.
INSIDE = "inside"
# Sides of the square matrices of `matmul_rate`: large enough for the full rate, small enough for little time.
MATRIX_SIDES = {"cpu": 1024, "cuda": 8192}
# Beyond every cache.
COPIED_BYTES = 2**28


class StepClock:
    """Records when the parts of steps end: events of the current stream on a GPU, else the time of day."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str | None, Any]] = []

    def mark(self, part: str | None) -> Any:
        """End a part; None ends time that belongs to no part, such as the time between two steps."""
        if self._on_gpu:
            stamp: Any = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = time.perf_counter()
        self._marks.append((part, stamp))
        return stamp

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one mark to another. A GPU must have reached both."""
        seconds: float = begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
        return seconds

    def durations(self) -> list[tuple[str | None, float]]:
        """Each part with its seconds, in order. On a GPU this waits until the last mark is reached."""
        if self._on_gpu and self._marks:
            self._marks[-1][1].synchronize()
        return [(part, self.between(begin, end)) for (_, begin), (part, end) in pairwise(self._marks)]

    def seconds(self) -> dict[str, float]:
        """The sum of each part's durations, in seconds; see `durations`."""
        sums: defaultdict[str, float] = defaultdict(float)
        inside = 0.0
        for part, seconds in self.durations():
            if part == INSIDE:
                inside += seconds
            elif part is not None:
                sums[part] += seconds + (0.0 if part == EXCHANGE else inside)
                inside = inside if part == EXCHANGE else 0.0
        return dict(sums)


class OperatorCount(TorchDispatchMode):
    """`with OperatorCount() as count:` counts the floating-point operations and collectives that are run inside.

    It sees what reaches PyTorch's dispatcher, also what a recomputation repeats. Compiled code runs eagerly inside, so
    that its results differ in their last bits. A multiplication and an addition are two operations.

    Args:
        clock: if given, every collective is waited for at once and marked as `EXCHANGE`.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention.
        collectives: bytes handed to each kind of collective; of a gather, those of its result.
    """

    def __init__(self, clock: StepClock | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.collectives: defaultdict[str, int] = defaultdict(int)
        self._clock = clock

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        out = func(*args, **kwargs)
        count: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out

    def _collective(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        name = str(func._overloadpacket.__name__).strip("_")
        # The first argument is the result, which a reduce-scatter's input exceeds.
        given = args[1] if "reduce_scatter" in name else args[0]
        self.collectives[name] += sum(
            leaf.numel() * leaf.element_size() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)
        )
        if self._clock is None:
            return func(*args, **kwargs)
        self._clock.mark(INSIDE)
        out = func(*args, **kwargs)
        # The last of its results is the handle.
        (out[-1] if isinstance(out, tuple) else out).wait()
        self._clock.mark(EXCHANGE)
        return out


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of a matrix product on a device: what no network exceeds. Takes about `seconds`, and waits."""
    side = MATRIX_SIDES[device.type]
    generator = torch.Generator(device).manual_seed(0)
    # Random values: a GPU multiplies constants faster.
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / _time_of(lambda: torch.mm(left, right, out=out), device, seconds)


def copy_rate(device: torch.device, seconds: float = 0.1) -> float:
    """Bytes per second that a device reads and writes in a copy within its memory. Takes about `seconds`, and waits."""
    source = torch.zeros(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _time_of(lambda: target.copy_(source), device, seconds)


def _time_of(action: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The median time of an action, in seconds, after a first call that does not count."""

    def once() -> float:
        clock = StepClock(device)
        clock.mark(None)
        action()
        clock.mark(EXCHANGE)
        return clock.durations()[0][1]

    once()
    times: list[float] = []
    while sum(times) < seconds:
        times.append(once())
    return median(times)
