"""Random numbers of a training step, the same however the global batch is split over ranks and micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class StepDraws:
    """Draws for rows `rows` of the global batch of one step.

    Every call draws for the whole global batch from a generator of its own, keyed by (seed, step, purpose), and
    returns this rank's rows. A sample's noise therefore depends on its place in the data alone, and a step can be
    repeated at any time, on any number of ranks.
    """

    def __init__(self, seed: str, step: int, global_batch_size: int, rows: slice, device: torch.device) -> None:
        self.key = f"{seed}/{step}"
        self.global_batch_size = global_batch_size
        self.rows = rows
        self.device = device

    def _generator(self, purpose: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.key}/{purpose}".encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Unit normal noise [rows, *shape], float32."""
        generator = self._generator(purpose)
        return torch.randn(self.global_batch_size, *shape, generator=generator, device=self.device)[self.rows]

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform integers in [0, high), [rows]."""
        generator = self._generator(purpose)
        return torch.randint(high, (self.global_batch_size,), generator=generator, device=self.device)[self.rows]

    def chance(self, purpose: str, probability: float) -> Tensor:
        """True with the given probability, [rows]."""
        generator = self._generator(purpose)
        return torch.rand(self.global_batch_size, generator=generator, device=self.device)[self.rows] < probability
