"""A batch of samples, the interface of the streams that yield batches, and the memory of batches.

With `data.flip` images are mirrored at random, by seed and position: a resumed run mirrors the same ones.
"""

from __future__ import annotations

import math
import re
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vdtrain.data.latents import MODALITY
from vdtrain.data.order import uniform
from vdtrain.errors import ConfigError
from vdtrain.seeds import seed_of


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
    A stream may have its `patience` (`vdtrain.storage.patience`), which knows what it waits for. A class may have
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


# Words that a mirrored image would belie: left, LEFT, left-hand, rightmost, leftwards, but not bright or leftover.
SIDES = re.compile(
    r"(?<![^\W\d_])(top|bottom|upper|lower)?(left|right)(s|most|wards?|y|ies|hand\w*|side\w*|facing)?(?![^\W\d_])",
    re.IGNORECASE,
)


def names_a_side(caption: str) -> bool:
    """Whether a caption names left or right."""
    return SIDES.search(caption) is not None


class Mirror:
    """Mirrors each image of a batch, in place, with a chance of one half; not if a caption names left or right.

    A position of the stream is one sample in one epoch.

    Args:
        seed: of the phase's stream.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed_of(seed, "flip")

    def __call__(self, batch: Batch) -> Batch:
        """The batch; a ConfigError if its images are no tensor [b, ..., height, width]."""
        images = batch.samples.get(MODALITY)
        if images is None and MODALITY in batch.rows:
            return batch
        if not isinstance(images, torch.Tensor) or images.ndim < 3:
            raise ConfigError("data.flip=true: data.stream yields no images as a tensor; leave it out")
        chosen = uniform(self._seed, batch.positions.numpy(), 1)[:, 0] < 0.5
        for name, texts in batch.samples.items():
            if isinstance(texts, list):
                free = np.array([not (isinstance(text, str) and names_a_side(text)) for text in texts], dtype=bool)
                chosen[_rows(batch, name)] &= free
        chosen = chosen[_rows(batch, MODALITY)]
        rows = torch.from_numpy(np.flatnonzero(chosen))
        images[rows] = images[rows].flip(-1)
        return batch


def _rows(batch: Batch, modality: str) -> slice | NDArray[np.int64]:
    return batch.rows[modality].numpy() if modality in batch.rows else slice(None)
