"""Records a module's passes on a CPU as CUDA graphs do on a GPU: all replays share one memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class MemoryRecorder:
    """A recorder for `record_passes`.

    A replay copies its inputs into the memory of the recorded ones. Its outputs and gradients lie in the memory of
    those of the replay before. The parameters must still lie where they did.

    Attributes:
        recorded: number of recordings.
        replayed: number of replays with a backward pass.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, module: nn.Module, tensors: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
        self.recorded += 1
        recorder, parameters = self, list(module.parameters())
        addresses = [each.data_ptr() for each in parameters]
        trained = [each for each in parameters if each.requires_grad]
        outputs: list[Tensor] = []
        gradients: list[Tensor | None] = []

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(context: Any, *given: Tensor) -> tuple[Tensor, ...]:
                assert [each.data_ptr() for each in parameters] == addresses
                for own, each in zip(tensors, given[: len(tensors)], strict=True):
                    assert (own.shape, own.stride(), own.dtype) == (each.shape, each.stride(), each.dtype)
                    own.copy_(each)
                with torch.enable_grad():
                    context.found = module(*tensors)
                written(outputs, [each.detach() for each in context.found])
                return tuple(each.detach() for each in outputs)

            @staticmethod
            def backward(context: Any, *given: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
                recorder.replayed += 1
                written(gradients, torch.autograd.grad(context.found, trained, given, allow_unused=True))
                found = iter(gradients)
                mine = [next(found) if each.requires_grad else None for each in parameters]
                return (*[None] * len(tensors), *(each if each is None else each.detach() for each in mine))

        return lambda *given: Replay.apply(*given, *parameters)  # type: ignore[no-any-return, no-untyped-call]


def written(memory: list[Any], values: Any) -> None:
    """Write values into the memory of those before them; the first ones become the memory."""
    if not memory:
        memory.extend(None if each is None else each.clone() for each in values)
    for own, each in zip(memory, values, strict=True):
        assert (own is None) == (each is None)
        if own is not None:
            own.copy_(each)
