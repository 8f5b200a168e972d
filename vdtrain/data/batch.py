"""A batch of samples, the stream that yields such batches, and the memory that they lie in."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch: b samples, each in every modality.

    Attributes:
        samples: by modality, in the form that its VAE and context encoder take: a tensor [b, ...] or a list of b.
        positions: int64 [b] global positions.
        moments: by modality, tensors [b, ...] of cached moments that stand for the VAE's encoding of the samples.
        replaced: bad samples that were replaced by others, by reason.
    """

    samples: dict[str, Any]
    positions: torch.Tensor
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    replaced: Mapping[str, int] = field(default_factory=dict)


class BatchStream(Protocol):
    """What training asks of a stream; `data.stream` names one by its `_target_`, with arguments of its own.

    It is made anew for every phase of a stage, with the arguments of `vdtrain.data.stream.PairStream` from `manifest`
    to `start` and `workers`, by name, and must guarantee three things. It does not end. The batch at a position depends
    on the other arguments alone, so that a run that is stopped goes on with the samples that it would have seen. And
    the ranks' batches, put one after another, are the batch of one rank that reads alone. A stream whose batches also
    depend on files may have a string `identity` of them: a run that resumes on others says so.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Batches of global_batch_size / world_size samples, in every modality of the stage's flows."""

    def close(self) -> None:
        """Let go of files and threads; nothing is read afterwards."""


class BatchMemory:
    """Memory of batches, pinned where there is a GPU, so that it travels while the GPU computes.

    What a batch lay in is given to another when nobody holds a tensor of it any more: the kernel would have to clear
    fresh pages. PyTorch itself does as much for pinned memory.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)

    def take(self, shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        """A tensor of any content, in memory that no other tensor has."""
        if torch.cuda.is_available():
            return torch.empty(shape, dtype=kind, pin_memory=True)
        size = math.prod(shape) * kind.itemsize
        free = self._free[size]
        memory = free.pop() if free else np.empty(size, np.uint8)
        # Every tensor of the batch, views too, keeps this array alive, and nothing else does.
        lent = memory[:]
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(kind).view(shape)
