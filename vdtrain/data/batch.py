"""A batch of samples, the interface of the streams that yield batches, and the memory of batches."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch: b samples, each in every modality unless `rows` says otherwise.

    Attributes:
        samples: by modality, in the form that its VAE and context encoder take: a tensor [b, ...] or a list of b.
        positions: int64 [b] global positions.
        moments: by modality, tensors [b, ...] of cached moments, which replace the VAE's encoding of the samples.
        replaced: how many bad samples were replaced by others, by reason.
        names: SHARD/KEY of the samples, the same in every order and run; empty if the stream does not tell them.
        rows: by modality that samples may lack, int64 [n] which of the b samples have it, rising. Its `samples` and
            `moments` then have n entries, and may be left out if n is 0. A stream names the same modalities here in
            every batch of every process.
    """

    samples: dict[str, Any]
    positions: torch.Tensor
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    replaced: Mapping[str, int] = field(default_factory=dict)
    names: Sequence[str] = ()
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positions)

    def cut(self, start: int, stop: int) -> Batch:
        """The samples `start` ... `stop - 1`, as views; without the count of what was replaced."""
        edges = torch.tensor([start, stop])
        own = {name: slice(*torch.searchsorted(rows, edges).tolist()) for name, rows in self.rows.items()}

        def part(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: each[own.get(name, slice(start, stop))] for name, each in values.items()}

        rows = {name: rows[own[name]] - start for name, rows in self.rows.items()}
        return Batch(
            part(self.samples), self.positions[start:stop], part(self.moments), {}, self.names[start:stop], rows
        )

    def take(self, order: torch.Tensor) -> Batch:
        """The samples int64 [n] in another order, without moments and the count of what was replaced."""

        def chosen(values: Any, places: torch.Tensor) -> Any:
            return values[places] if isinstance(values, torch.Tensor) else [values[each] for each in places.tolist()]

        places, rows = dict.fromkeys(self.samples, order), {}
        for name, there in self.rows.items():
            has = torch.isin(order, there)
            places[name], rows[name] = torch.searchsorted(there, order[has]), has.nonzero()[:, 0]
        samples = {name: chosen(values, places[name]) for name, values in self.samples.items()}
        return Batch(samples, self.positions[order], names=chosen(self.names, order) if self.names else (), rows=rows)


class BatchStream(Protocol):
    """The stream interface of training; `data.stream` names a class by `_target_`, with its own arguments.

    Every phase of a stage makes a new stream. Training passes the arguments of `vdtrain.data.stream.PairStream` from
    `seed` to `start`, and `workers`, by name, and `manifest` if the class takes it: a stream without it has no index.
    The tensors of a batch belong to the caller, who may change them. A stream must guarantee three things:
    * It does not end.
    * The batch at a position depends only on the other arguments. A resumed run therefore reads the same samples.
    * The batches of all ranks, concatenated in rank order, equal the batch of a single rank.
    A stream whose batches also depend on files may have a string `identity` of those files. A run that resumes with
    another identity prints a warning.

    A stream without an index need not guarantee the last two; `remarks` says so, lines that a run prints once at its
    start. After an error that may pass (`vdtrain.errors.passes`), training ends with a status that asks for a restart.
    A stream may have its `patience` (`vdtrain.data.patience`), which knows what it waits for. A class may have
    `check(**arguments)`, which raises a ConfigError for wrong settings before anything is built, and `probe()`, which
    yields a line on each of a few parts of the data that cannot be read.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Batches of global_batch_size / world_size samples; see `Batch.rows` for samples that lack a modality."""

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
