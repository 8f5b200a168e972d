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
        # On the device, for there it is decided whether a step counts.
        device = self.rows[0].device
        self._updates = torch.zeros((), dtype=torch.float64, device=device)
        self._always = torch.ones((), dtype=torch.bool, device=device)

    @property
    def updates(self) -> int:
        """Updates so far. Reading it waits for the device."""
        return int(self._updates.item())

    @torch.no_grad()
    def update(self, applied: Tensor | None = None) -> None:
        """Move the average towards the present weights, without waiting for the device; call it after every step.

        Args:
            applied: a boolean scalar; where it is false, the average and its count keep every bit.
        """
        counts = self._always if applied is None else applied
        number = self._updates + 1
        keep = torch.clamp((1 + number) / (10 + number), max=self.decay)
        share = torch.where(counts, 1 - keep, 0.0).float()
        for row, partition in zip(self.rows, self._partitions, strict=True):
            row.lerp_(partition.master, share)
        self._updates += counts

    @torch.no_grad()
    def restart(self) -> None:
        """Start again at the present weights."""
        for row, partition in zip(self.rows, self._partitions, strict=True):
            row.copy_(partition.master)
        self._updates.zero_()

    @torch.no_grad()
    def load(self, read: RowReader, updates: int) -> None:
        """Take this process's pieces from `read`."""
        for partition, row in zip(self._partitions, self.rows, strict=True):
            row.copy_(read(partition.layout.group, EMA, partition.start, partition.stop))
        self._updates.fill_(updates)
