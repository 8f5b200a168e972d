"""Records on a CPU with the rules of CUDA graphs: every replay reads and writes the memory of the recording."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vdtrain.models.execution import Pass, Recorded


class MemoryTape:
    """A tape for `record_passes`. A replay computes again, into the memory of the first results.

    Attributes:
        recorded, replayed: how many functions, and how often, over all tapes of a test.
    """

    recorded = replayed = 0

    def rehearse(self, function: Callable[[], object]) -> None:
        function()

    def record(self, function: Pass) -> Recorded:
        MemoryTape.recorded += 1
        memory = [None if each is None else each.detach().clone() for each in function()]

        def replay() -> None:
            MemoryTape.replayed += 1
            # A replay happens inside an autograd function, which turns gradients off.
            with torch.enable_grad():
                found = function()
            for own, each in zip(memory, found, strict=True):
                assert (own is None) == (each is None)
                if own is not None and each is not None:
                    assert own.stride() == each.stride()
                    own.copy_(each.detach())

        return memory, replay
