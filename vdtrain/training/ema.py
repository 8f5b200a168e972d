"""Averaged weights, each process averaging its own piece of the float32 master weights: no communication."""

from __future__ import annotations

import torch
from torch import Tensor

from vdtrain.training.engine import Engine
from vdtrain.training.partitions import EMA, RowReader


def kept_share(number: Tensor, length: float, decay: float | None = None) -> Tensor:
    """What an average keeps of itself at updates `number`, counted from 1: float64, of the same shape.

    Args:
        length: mean age of what is in the average after many updates, as a share of their number; in (0, 0.5].
        decay: upper limit, from which on the average looks back over 1 / (1 - decay) updates; None for none.
    """
    keep = (1 + number) / (1 / length + number)
    return keep if decay is None else torch.clamp(keep, max=decay)


class ShardEMA:
    """Moving average of the master weights, whose memory grows with the number of updates since it started.

    See `kept_share`. After many updates its profile is a power of their number, with the exponent 1 / length - 2, as
    Karras et al. 2024 propose (arXiv 2312.02696).

    Args:
        engine: whose pieces are averaged; the average starts at their present values.
        length, decay: see `kept_share`.
    """

    def __init__(self, engine: Engine, decay: float | None = None, length: float = 0.1) -> None:
        if not 0.0 < length <= 0.5 or (decay is not None and not 0.0 <= decay < 1.0):
            raise ValueError(f"ema.length={length} is not in (0, 0.5], or ema.decay={decay} not in [0, 1)")
        self.decay, self.length = decay, length
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
        share = torch.where(counts, 1 - kept_share(number, self.length, self.decay), 0.0).float()
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
