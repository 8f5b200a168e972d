"""Memory layout of a layer group: parameters end to end in one flat buffer, with one partition per process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# DeepSpeed pads each buffer so that all partitions have the same even number of elements.
ALIGNMENT = 2

# What a process holds of each layer group, as flat float32 buffers; "ema" only if EMA is enabled.
MASTER, FIRST_MOMENT, SECOND_MOMENT, EMA = "master", "exp_avg", "exp_avg_sq", "ema"

# Reads elements [start, stop) of a group's buffer: (group, kind, start, stop) -> float32 [stop - start].
BufferReader = Callable[[str, str, int, int], Tensor]


@dataclass(frozen=True)
class ParameterSlot:
    """A parameter's position in its layer group's buffer; `offset` in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GroupLayout:
    """The buffer of a layer group. Only its partitions depend on the number of processes."""

    group: str
    slots: tuple[ParameterSlot, ...]

    @classmethod
    def of(cls, group: str, parameters: Mapping[str, nn.Parameter]) -> GroupLayout:
        slots, offset = [], 0
        for name, parameter in parameters.items():
            slots.append(ParameterSlot(name, tuple(parameter.shape), offset))
            offset += parameter.numel()
        return cls(group, tuple(slots))

    @property
    def numel(self) -> int:
        """Elements of the buffer, padding excluded."""
        return sum(slot.numel for slot in self.slots)

    def partition_size(self, world_size: int) -> int:
        """Elements of each process's partition, padding included."""
        return math.ceil(self.numel / (ALIGNMENT * world_size)) * ALIGNMENT

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
            flat = parameters[slot.name].detach().reshape(-1)
            buffer[first - start : last - start] = flat[first - slot.offset : last - slot.offset]
    return buffer
