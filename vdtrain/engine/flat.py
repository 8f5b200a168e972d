"""Flat buffers of weights and gradients: replicas under ZeRO 0 and in a single process, or partitioned masters.

Every process has the whole weights and gradients of each layer group in one buffer each. The group's parameters lie end
to end in it, with one partition per process. Partitioned ("sharded", ZeRO 1), a step moves the least bytes possible:
one reduce-scatter of the gradients, one all-gather of the weights.

No collective makes the host or the compute stream wait before its result is needed. Gradients are reduced during
backward, weights are gathered while the next step encodes. NCCL runs its collectives on a stream of its own, which
first waits for what the compute stream has queued; `Work.wait` lets the compute stream wait for the result. The buffers
live as long as the engine, so that the allocator cannot reuse their memory early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vdtrain.engine.deepspeed import EngineSettings
from vdtrain.run import distributed

# Each partition has a multiple of so many elements: DeepSpeed's, and 128 bytes in bf16 with the engine's own exchange.
# On a GPU, matrix products, compiled passes and collectives that begin elsewhere take slower kernels or copies. Matrix
# products took twice the time (benchmarks/results/gpu.json).
DEEPSPEED_ALIGNMENT, OWN_ALIGNMENT = 2, 64

# What a process holds of each layer group, as flat float32 buffers; "ema" only if EMA is enabled.
MASTER, FIRST_MOMENT, SECOND_MOMENT, EMA = "master", "exp_avg", "exp_avg_sq", "ema"

# Reads elements [start, stop) of a group's buffer: (group, kind, start, stop) -> float32 [stop - start].
BufferReader = Callable[[str, str, int, int], Tensor]


@dataclass(frozen=True)
class ParameterSlot:
    """A parameter's position in its layer group's buffer.

    Attributes:
        offset: in elements.
        channels_last: whether the buffer has a convolution's weight [O, I, H, W] in the order O, H, W, I. It is no part
            of what the parameter is, so that slots which differ in it alone are equal.

    Raises:
        ValueError: channels_last, and the shape is not a convolution's.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    channels_last: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.channels_last and len(self.shape) != 4:
            raise ValueError(f"{self.name}: channels last, but its shape is {list(self.shape)}")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def part(self, buffer: Tensor) -> Tensor:
        """The parameter's elements [numel] of its group's buffer."""
        return buffer[self.offset : self.offset + self.numel]

    def flat(self, tensor: Tensor) -> Tensor:
        """The elements [numel] of a tensor of the parameter's shape, in the order of the buffer."""
        return (tensor.permute(0, 2, 3, 1) if self.channels_last else tensor).reshape(-1)

    def shaped(self, elements: Tensor) -> Tensor:
        """A view of the buffer's elements [numel] in the parameter's shape."""
        if not self.channels_last:
            return elements.view(self.shape)
        rows, channels, height, width = self.shape
        return elements.view(rows, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class GroupLayout:
    """The buffer of a layer group. Only its partitions depend on the number of processes.

    Attributes:
        alignment: each partition has a multiple of so many elements. Layouts that differ in it alone are equal.

    Raises:
        ValueError: the alignment is not positive.
    """

    group: str
    slots: tuple[ParameterSlot, ...]
    alignment: int = field(default=DEEPSPEED_ALIGNMENT, compare=False)

    def __post_init__(self) -> None:
        if self.alignment < 1:
            raise ValueError(f"{self.group}: alignment={self.alignment}")

    @classmethod
    def of(cls, group: str, parameters: Mapping[str, nn.Parameter], deepspeed: bool = True) -> GroupLayout:
        """Parameters end to end.

        Args:
            deepspeed: the layout is that of DeepSpeed, where every weight has the order of its shape. Otherwise each
                keeps its order in memory.
        """
        slots, offset = [], 0
        for name, parameter in parameters.items():
            turned = not deepspeed and parameter.ndim == 4 and not parameter.is_contiguous()
            turned = turned and parameter.is_contiguous(memory_format=torch.channels_last)
            slots.append(ParameterSlot(name, tuple(parameter.shape), offset, turned))
            offset += parameter.numel()
        return cls(group, tuple(slots), DEEPSPEED_ALIGNMENT if deepspeed else OWN_ALIGNMENT)

    @property
    def numel(self) -> int:
        """Elements of the buffer, padding excluded."""
        return sum(slot.numel for slot in self.slots)

    def read(self, other: GroupLayout, read: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
        """Elements [start, stop) in this layout's order.

        Args:
            other: the same parameters, some of them in another order.
            read: returns elements [start, stop) in the other order, in memory of their own.
        """
        elements = read(start, stop)
        for own, their in zip(self.slots, other.slots, strict=True):
            first, last = max(start, own.offset), min(stop, own.offset + own.numel)
            if first < last and own.channels_last != their.channels_last:
                whole = own.flat(their.shaped(read(own.offset, own.offset + own.numel)))
                elements[first - start : last - start] = whole[first - own.offset : last - own.offset]
        return elements

    def partition_size(self, world_size: int) -> int:
        """Elements of each process's partition, padding included."""
        return math.ceil(self.numel / (self.alignment * world_size)) * self.alignment

    def partition(self, rank: int, world_size: int) -> tuple[int, int]:
        """Bounds [start, stop) of a process's partition without padding; the last ones may be short or empty."""
        size = self.partition_size(world_size)
        return min(rank * size, self.numel), min((rank + 1) * size, self.numel)


@dataclass(frozen=True)
class Partition:
    """This process's partition of a layer group: views of the optimiser's memory, float32 [stop - start]."""

    layout: GroupLayout
    start: int
    stop: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def buffers(self) -> dict[str, Tensor]:
        return {MASTER: self.master, FIRST_MOMENT: self.exp_avg, SECOND_MOMENT: self.exp_avg_sq}


@torch.no_grad()
def cut(parameters: Mapping[str, Tensor], layout: GroupLayout, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a group's buffer, copied from its parameters: float32, on their device."""
    device = parameters[layout.slots[0].name].device
    buffer = torch.empty(stop - start, dtype=torch.float32, device=device)
    for slot in layout.slots:
        first, last = max(start, slot.offset), min(stop, slot.offset + slot.numel)
        if first < last:
            flat = slot.flat(parameters[slot.name].detach())
            buffer[first - start : last - start] = flat[first - slot.offset : last - slot.offset]
    return buffer


def lay_out_zeros(groups: Mapping[str, Mapping[str, nn.Parameter]], dtype: torch.dtype) -> None:
    """Let parameters lie as in a single process that trains them, with the value 0: without masters and gradients.

    What is compiled for them is then what training runs: it depends on where the weights lie in memory.
    """
    layouts = [GroupLayout.of(group, parameters, deepspeed=False) for group, parameters in groups.items()]
    sizes = _sizes(layouts, world_size=1)
    device = next(iter(groups[layouts[0].group].values())).device
    for layout, weights in zip(layouts, torch.zeros(sum(sizes), dtype=dtype, device=device).split(sizes), strict=True):
        _make_views(groups[layout.group], layout, weights)


class FlatStrategy:
    """See engine.Strategy.

    Args:
        sharded: a process keeps and updates its own partition of the masters alone.

    Raises:
        RuntimeError: on every process, if their weights differ.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Mapping[str, Mapping[str, nn.Parameter]],
        layouts: Sequence[GroupLayout],
        settings: EngineSettings,
        sharded: bool,
    ) -> None:
        self._module, self._sharded = module, sharded
        _check_same_start(module)
        self._world_size = distributed.world_size()
        sizes = _sizes(layouts, self._world_size)
        whole = torch.zeros(sum(sizes), device=next(module.parameters()).device)
        for layout, buffer in zip(layouts, whole.split(sizes), strict=True):
            buffer[: layout.numel] = cut(groups[layout.group], layout, 0, layout.numel)
        module.to(settings.compute_dtype)
        self._weights = whole.to(settings.compute_dtype).split(sizes)
        self.masters = [self._held(buffer) for buffer in whole.split(sizes)]
        # In float32 the masters are the module's weights.
        self._separate = settings.compute_dtype != torch.float32
        if sharded and self._separate:
            self.masters = [master.clone() for master in self.masters]
        self._gradient = torch.zeros_like(whole)
        self._gradients = self._gradient.split(sizes)
        self._parameters = [len(groups[layout.group]) for layout in layouts]
        # In a step's last backward: how many parameters of each group still have no gradient.
        self._missing: list[int] | None = None
        self._reductions: list[dist.Work | None] = []
        self._gathers: list[dist.Work | None] = []
        self._hooks: list[Any] = []
        for index, (layout, weights, gradients) in enumerate(zip(layouts, self._weights, self._gradients, strict=True)):
            share = settings.gradient_scale(layout.group) / self._world_size
            _make_views(groups[layout.group], layout, weights)
            for slot in layout.slots:
                add = self._adder(index, slot.shaped(slot.part(gradients)), share)
                self._hooks.append(groups[layout.group][slot.name].register_post_accumulate_grad_hook(add))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return self._module(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._missing = list(self._parameters) if last and self._world_size > 1 else None
        loss.backward()
        for index, missing in enumerate(self._missing or ()):
            if missing:
                self._reduce(index)

    def gradients(self) -> list[Tensor]:
        _wait(self._reductions)
        return [self._held(gradient) for gradient in self._gradients]

    def zero_grad(self) -> None:
        self._gradient.zero_()

    def local_slice(self, start: int, stop: int) -> slice:
        return slice(0, stop - start) if self._sharded else slice(start, stop)

    def all_gather(self, buffers: Sequence[Tensor]) -> None:
        if not self._sharded:
            for buffer in buffers:
                dist.all_gather_into_tensor(buffer, self._own(buffer))

    def lowered(self) -> list[Tensor] | None:
        # Several replicas average a partition each, so that a pass over whole masters does not fit them.
        if not self._separate or (self._world_size > 1 and not self._sharded):
            return None
        self.settle()
        return [self._held(weights) for weights in self._weights]

    def broadcast(self, written: bool = False) -> None:
        self.settle()
        for weights, master in zip(self._weights, self.masters, strict=True):
            if self._separate and not written:
                self._held(weights).copy_(master)
            if self._sharded:
                self._gathers.append(dist.all_gather_into_tensor(weights, self._own(weights), async_op=True))

    def settle(self) -> None:
        _wait(self._gathers)

    def close(self) -> None:
        self.settle()
        for hook in self._hooks:
            hook.remove()

    def _own(self, buffer: Tensor) -> Tensor:
        """This process's partition of a whole buffer, padding included."""
        return buffer.view(self._world_size, -1)[distributed.rank()]

    def _held(self, buffer: Tensor) -> Tensor:
        """The part of a whole buffer that this process updates."""
        return self._own(buffer) if self._sharded else buffer

    def _adder(self, index: int, total: Tensor, share: float) -> Callable[[Tensor], None]:
        """The hook of a parameter of group `index` whose gradients, times `share`, are added up in `total`."""

        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            # Each gradient joins the float32 sum as it arrives, and its own memory is free at once.
            total.add_(parameter.grad, alpha=share)
            parameter.grad = None
            if self._missing is not None:
                self._missing[index] -= 1
                if self._missing[index] == 0:
                    self._reduce(index)

        return add

    def _reduce(self, index: int) -> None:
        """Start a group's reduction. Processes that run the same flows do it in the same order: autograd's is fixed."""
        whole = self._gradients[index]
        if self._sharded:
            work = dist.reduce_scatter_tensor(self._own(whole), whole, async_op=True)
        else:
            work = dist.all_reduce(whole, async_op=True)
        self._reductions.append(work)


def _sizes(layouts: Sequence[GroupLayout], world_size: int) -> list[int]:
    """Elements of each group's whole buffer."""
    return [layout.partition_size(world_size) * world_size for layout in layouts]


def _make_views(parameters: Mapping[str, nn.Parameter], layout: GroupLayout, weights: Tensor) -> None:
    """Let a group's parameters be views of its buffer."""
    for slot in layout.slots:
        parameters[slot.name].data = slot.shaped(slot.part(weights))


def _wait(works: list[dist.Work | None]) -> None:
    while works:
        work = works.pop(0)
        # None is for processes outside the group.
        if work is not None:
            work.wait()


def _check_same_start(module: nn.Module) -> None:
    same = True
    for tensor in module.state_dict().values():
        # Collectives take no other order.
        first = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, src=0)
        same = same and torch.equal(first, tensor)
    if not distributed.all_agree(same):
        raise RuntimeError("the processes started from different weights; build the module from the same seed and file")
