"""Averaged weights, each process averaging its own piece of the float32 master weights: no communication."""

from __future__ import annotations

import torch
from torch import Tensor

from vdtrain.training.engine import Engine
from vdtrain.training.partitions import EMA, RowReader


class ShardEMA:
    """Exponential moving average of the master weights.

    After update number n the average keeps min(decay, (1 + n) / (10 + n)) of itself, so that the first weights, far
    from where training leads, are soon forgotten.

    Args:
        engine: whose pieces are averaged; the average starts at their present values.
        decay: share of the old average that an update keeps, in [0, 1).
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema.decay: {decay} is not in [0, 1)")
        self.decay = decay
        self._partitions = engine.partitions()
        self.rows: list[Tensor] = [partition.master.clone() for partition in self._partitions]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights; call it after every applied step."""
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.rows, [partition.master for partition in self._partitions], 1.0 - keep)

    @torch.no_grad()
    def restart(self) -> None:
        """Start again at the present weights."""
        for row, partition in zip(self.rows, self._partitions, strict=True):
            row.copy_(partition.master)
        self.updates = 0

    @torch.no_grad()
    def load(self, read: RowReader, updates: int) -> None:
        """Take this process's pieces from `read`."""
        for partition, row in zip(self._partitions, self.rows, strict=True):
            row.copy_(read(partition.layout.group, EMA, partition.start, partition.stop))
        self.updates = updates
