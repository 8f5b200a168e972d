"""Batches of image-text pairs out of tar shards, in an order that is a pure function of seed and position.

Position p, counted over all epochs, is sample p mod n of a permutation drawn for epoch p div n. The global batch g
of size B holds positions gB ... (g + 1)B - 1, and each rank takes its contiguous part of it. A run therefore resumes
at any position, on any number of ranks, from a single number.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vdtrain.data.decode import DecodeError, decode
from vdtrain.data.manifest import Manifest, ManifestError

# Share of samples that may turn out bad before a run stops; below it, each is replaced by its neighbour.
BAD_SHARE = 0.01
BAD_ALLOWANCE = 10


class StreamError(RuntimeError):
    """Data that cannot be trained on; the message is one line."""


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch: b samples, each in every modality.

    Attributes:
        samples: by modality, in the form that its VAE and context encoder take: a tensor [b, ...] or a list of b.
        positions: int64 [b] global positions.
    """

    samples: dict[str, Any]
    positions: torch.Tensor


class BatchStream(Protocol):
    """What training asks of a stream; `data.stream` names one by its `_target_`, with arguments of its own.

    It is made anew for every phase of a stage, with the arguments of `PairStream` from `manifest` to `start` and
    `workers`, by name, and must guarantee three things. It does not end. The batch at a position depends on the other
    arguments alone, so that a run that is stopped goes on with the samples that it would have seen. And the ranks'
    batches, put one after another, are the batch of one rank that reads alone.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Batches of global_batch_size / world_size samples, in every modality of the stage's flows."""

    def close(self) -> None:
        """Let go of files and threads; nothing is read afterwards."""


class PairStream:
    """Image-text pairs, {"image": uint8 [b, 3, R, R], "text": b captions}, decoded ahead by threads; a `BatchStream`.

    Args:
        manifest: folder written by `python -m data_pipeline index`.
        seed: of the order and of the crops.
        resolution: R, side of the pictures in pixels.
        global_batch_size: pairs per step over all ranks.
        start: position of the first pair to deliver, a multiple of the global batch size.
        workers: decoding threads.
        prefetch: batches kept ready beyond those being decoded.
        min_side: pictures with a shorter side are left out; the resolution by default.
        random_crop: crop at a random place (a function of seed and position), else at the centre.

    Raises:
        ManifestError: no manifest, or no picture in it is large enough.
        StreamError: while iterating, if too many samples are bad or a shard cannot be read.
    """

    def __init__(
        self,
        manifest: Path,
        *,
        seed: int,
        resolution: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        workers: int = 2,
        prefetch: int = 2,
        min_side: int | None = None,
        random_crop: bool = True,
    ) -> None:
        if global_batch_size % world_size or start % global_batch_size:
            raise ValueError(f"batch {global_batch_size}, {world_size} ranks, start {start}: must divide evenly")
        self.manifest = Manifest(manifest)
        shortest = resolution if min_side is None else min_side
        self.rows: NDArray[np.int64] = np.flatnonzero(self.manifest.shortest_side >= shortest)
        if len(self.rows) == 0:
            raise ManifestError(
                f"data.manifest={manifest}: none of {len(self.manifest)} pictures has a side of {shortest} pixels or "
                "more; lower the phase's resolution or index more shards"
            )
        self.seed = seed
        self.resolution = resolution
        self.random_crop = random_crop
        self.global_batch_size = global_batch_size
        self.local_batch_size = global_batch_size // world_size
        self.rank = rank
        self.next_batch = start // global_batch_size
        self.replaced: Counter[str] = Counter()
        self._delivered = 0
        self._ahead = workers + prefetch
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode")
        self._pending: deque[Future[Batch]] = deque()
        self._files: dict[int, int] = {}
        self._lock = Lock()
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            while len(self._pending) < self._ahead:
                self._pending.append(self._pool.submit(self._load, self.next_batch))
                self.next_batch += 1
            batch = self._pending.popleft().result()
            self._delivered += self.local_batch_size
            bad = sum(self.replaced.values())
            if bad > BAD_ALLOWANCE + BAD_SHARE * self._delivered:
                raise StreamError(
                    f"{bad} of {self._delivered} samples were bad ({dict(self.replaced)}); "
                    "index the shards again, and download those that it reports"
                )
            yield batch

    def close(self) -> None:
        """Stop the threads and close the shards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Manifest rows of global positions."""
        epochs, places = np.divmod(positions, len(self.rows))
        found = [self._order(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)]
        return self.rows[found]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        with self._lock:
            if epoch not in self._orders:
                # Batches ahead may reach into the next epoch, so two orders are kept.
                self._orders = {kept: order for kept, order in self._orders.items() if kept == epoch - 1}
                generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
                self._orders[epoch] = generator.permutation(len(self.rows))
            return self._orders[epoch]

    def _load(self, batch: int) -> Batch:
        first = batch * self.global_batch_size + self.rank * self.local_batch_size
        positions = np.arange(first, first + self.local_batch_size, dtype=np.int64)
        pictures = torch.empty(len(positions), self.resolution, self.resolution, 3, dtype=torch.uint8)
        captions = []
        for place, (position, row) in enumerate(zip(positions, self.rows_at(positions), strict=True)):
            picture, used = self._picture(int(position), int(row))
            pictures[place] = torch.from_numpy(np.ascontiguousarray(picture))
            captions.append(str(self.manifest.captions[used]))
        samples = {"image": pictures.permute(0, 3, 1, 2).contiguous(), "text": captions}
        return Batch(samples, torch.from_numpy(positions))

    def _picture(self, position: int, row: int) -> tuple[NDArray[np.uint8], int]:
        """The decoded picture at a position and the row that it came from: the next good one where a row is bad."""
        crop = (0.5, 0.5)
        if self.random_crop:
            place = np.random.Generator(np.random.Philox(key=[self.seed, 2**32 + position])).random(2)
            crop = (float(place[0]), float(place[1]))
        start = int(np.searchsorted(self.rows, row))
        for step in range(BAD_ALLOWANCE):
            candidate = int(self.rows[(start + step) % len(self.rows)])
            try:
                return decode(self._bytes(candidate), self.resolution, crop), candidate
            except DecodeError as error:
                self.replaced[str(error).split(":")[0]] += 1
        raise StreamError(f"{BAD_ALLOWANCE} samples in a row from manifest row {row} are bad; index the shards again")

    def _bytes(self, row: int) -> bytes:
        shard, size = int(self.manifest.shard[row]), int(self.manifest.size[row])
        try:
            data = os.pread(self._descriptor(shard), size, int(self.manifest.offset[row]))
        except OSError as error:
            raise StreamError(f"{self.manifest.shards[shard]}: {error.strerror}; index the shards again") from error
        if len(data) < size:
            raise StreamError(f"{self.manifest.shards[shard]}: shorter than its manifest says; index the shards again")
        return data

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self.manifest.shards[shard], os.O_RDONLY)
            return self._files[shard]
