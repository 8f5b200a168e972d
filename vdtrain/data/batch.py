"""A batch of samples, the interface of the streams that yield batches, and the memory of batches."""

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
        moments: by modality, tensors [b, ...] of cached moments, which replace the VAE's encoding of the samples.
        replaced: how many bad samples were replaced by others, by reason.
    """

    samples: dict[str, Any]
    positions: torch.Tensor
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    replaced: Mapping[str, int] = field(default_factory=dict)


class BatchStream(Protocol):
    """The stream interface of training; `data.stream` names a class by `_target_`, with its own arguments.

    Every phase of a stage makes a new stream. Training passes the arguments of `vdtrain.data.stream.PairStream` from
    `manifest` to `start`, and `workers`, by name. A stream must guarantee three things:
    * It does not end.
    * The batch at a position depends only on the other arguments. A resumed run therefore reads the same samples.
    * The batches of all ranks, concatenated in rank order, equal the batch of a single rank.
    A stream whose batches also depend on files may have a string `identity` of those files. A run that resumes with
    another identity prints a warning.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Batches of global_batch_size / world_size samples in every modality of the stage's flows."""

    def close(self) -> None:
        """Release files and threads; nothing is read afterwards."""


class BatchMemory:
    """Memory of batches. With a GPU it is pinned, so that the copy overlaps with computation.

    A new batch reuses the memory of an old one once no tensor refers to it; the kernel would have to clear new pages.
    PyTorch itself reuses pinned memory.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)

    def take(self, shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor whose memory belongs to no other tensor."""
        if torch.cuda.is_available():
            return torch.empty(shape, dtype=kind, pin_memory=True)
        size = math.prod(shape) * kind.itemsize
        free = self._free[size]
        memory = free.pop() if free else np.empty(size, np.uint8)
        # Only the tensors of the batch and their views keep this array alive.
        lent = memory[:]
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(kind).view(shape)
