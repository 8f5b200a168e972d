"""Images of tar shards through the image VAE's encoder, and their moments into one file for each shard.

Each process has a fixed share of the shards, so processes need not communicate before the end.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdtrain.data.decode import CENTRE, DecodeError, decode
from vdtrain.data.latents import (
    SUFFIX,
    LatentDescription,
    LatentFolder,
    Moments,
    file_prefix,
    out_of_range,
    write_latents,
)
from vdtrain.data.manifest import ShardRows
from vdtrain.data.shards import ShardReader
from vdtrain.errors import one_line
from vdtrain.files import INCOMPLETE
from vdtrain.progress import Progress

logger = logging.getLogger(__name__)

# A draft is written in one go. One that has not changed for so long was left by a process that was killed.
STALE_SECONDS = 3600.0

# Images uint8 [b, 3, R, R], on the CPU, to moments [b, ...] on any device.
Encoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Decoded:
    """Samples of one shard: numbers and offsets [b], images uint8 [b, 3, R, R] (black if bad), bool [b] whether bad."""

    shard: int
    rows: NDArray[np.int32]
    offsets: NDArray[np.int64]
    images: Tensor
    bad: NDArray[np.bool_]


@dataclass
class Made:
    """What one process has encoded; `bad` images could not be decoded or overflowed."""

    shards: int = 0
    images: int = 0
    bad: int = 0
    seconds: float = 0.0


class LatentEncoding:
    """Makes the missing files of one resolution.

    Args:
        encode: with the weights and the precision of `description`.
        batch_size: images that are encoded together; a batch never spans two shards.
        workers: decoding threads.
        rank, world_size: of the processes that share the work; each takes every `world_size`-th shard.
        heartbeat: called with what is being done, after every batch.
    """

    def __init__(
        self,
        folder: LatentFolder,
        reader: ShardReader,
        description: LatentDescription,
        encode: Encoder,
        *,
        batch_size: int,
        workers: int,
        rank: int,
        world_size: int,
        heartbeat: Callable[[str], None],
    ) -> None:
        self._folder, self._manifest, self._reader = folder, reader.manifest, reader
        self._description, self._encode, self._batch_size = description, encode, batch_size
        self._workers, self._rank, self._world_size = max(1, workers), rank, world_size
        self._heartbeat = heartbeat

    def run(self) -> Made:
        """Encode this process's share of what is missing."""
        began, made = time.monotonic(), Made()
        missing = self._folder.missing(self._manifest, self._description.min_side)
        own = [shard for shard in missing if shard % self._world_size == self._rank]
        whose = "" if self._world_size == 1 else f", rank {self._rank} of {self._world_size}"
        images = int(self._manifest.counts(self._description.min_side)[own].sum())
        title = f"latents {self._description.resolution}{whose}"
        with (
            ThreadPoolExecutor(self._workers, thread_name_prefix="decode") as pool,
            Progress(title, images, "images", silent=self._rank != 0) as progress,
        ):
            try:
                encoded = self._encoded(self._decoded(own, pool))
                for shard, batches in groupby(encoded, key=lambda each: each[0].shard):
                    self._write(shard, batches, made, progress)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        if self._rank == 0:
            self._remove_leftovers()
        made.seconds = time.monotonic() - began
        return made

    def _write(self, shard: int, batches: Iterable[tuple[Decoded, Moments]], made: Made, progress: Progress) -> None:
        """Write the file of one shard from its batches in order."""
        rows, offsets, bad, moments = [], [], [], []
        for batch, found in batches:
            # Such a value would poison a training run.
            is_bad = batch.bad | out_of_range(found)
            found[is_bad] = 0
            rows.append(batch.rows)
            offsets.append(batch.offsets)
            bad.append(is_bad)
            moments.append(found)
            progress.advance(len(found))
            self._heartbeat(f"encoding {self._manifest.paths[shard]}")
        joined = np.concatenate(bad)
        write_latents(
            self._folder.path_of(self._manifest, shard),
            self._description,
            self._manifest.hashes[shard],
            np.concatenate(rows),
            np.concatenate(offsets),
            joined,
            np.concatenate(moments),
        )
        made.shards, made.images, made.bad = made.shards + 1, made.images + len(joined), made.bad + int(joined.sum())

    def _decoded(self, shards: list[int], pool: ThreadPoolExecutor) -> Iterator[Decoded]:
        """Batches of the shards in their order, decoded ahead by threads."""
        ahead: deque[Future[Decoded]] = deque()
        for shard in shards:
            samples = self._reader.rows(shard)
            rows = np.flatnonzero(samples.side >= self._description.min_side).astype(np.int32)
            for first in range(0, len(rows), self._batch_size):
                ahead.append(pool.submit(self._decode, shard, samples, rows[first : first + self._batch_size]))
                if len(ahead) > 2 * self._workers:
                    yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _decode(self, shard: int, samples: ShardRows, rows: NDArray[np.int32]) -> Decoded:
        resolution = self._description.resolution
        pinned = torch.cuda.is_available()
        images = torch.zeros(len(rows), resolution, resolution, 3, dtype=torch.uint8, pin_memory=pinned)
        bad = np.zeros(len(rows), bool)
        for place, row in enumerate(rows):
            turn = partial(decode, resolution=resolution, crop=CENTRE, orientation=int(samples.orientation[row]))
            try:
                images.numpy()[place] = self._reader.use(shard, samples, int(row), turn)
            except DecodeError as error:
                bad[place] = True
                key = samples.keys[int(row)].as_py()
                logger.warning("no latent: %s, key %s (%s)", self._manifest.shards[shard], key, one_line(error))
        return Decoded(shard, rows, samples.offset[rows], images.permute(0, 3, 1, 2), bad)

    def _encoded(self, batches: Iterator[Decoded]) -> Iterator[tuple[Decoded, Moments]]:
        """Moments of the batches, float16 on the CPU; the next batch is encoded while one is copied."""
        before: tuple[Decoded, Callable[[], Moments]] | None = None
        for batch in batches:
            arriving = _arriving(self._encode(batch.images).half())
            if before is not None:
                yield before[0], before[1]()
            before = batch, arriving
        if before is not None:
            yield before[0], before[1]()

    def _remove_leftovers(self) -> None:
        """Remove drafts of processes that were killed, and latents of shards that have changed since."""
        path, names = self._folder.path, self._folder.names()
        for name in names:
            with suppress(FileNotFoundError):
                if name.endswith(INCOMPLETE) and time.time() - (path / name).stat().st_mtime > STALE_SECONDS:
                    (path / name).unlink()
        kept = {self._folder.path_of(self._manifest, shard).name for shard in range(len(self._manifest.paths))}
        prefixes = {file_prefix(shard) for shard in self._manifest.paths}
        for name in names - kept:
            if name.endswith(SUFFIX) and name.rpartition("-")[0] + "-" in prefixes:
                (path / name).unlink(missing_ok=True)


def _arriving(moments: Tensor) -> Callable[[], Moments]:
    """Send moments to the CPU; the call waits for them."""
    if moments.device.type != "cuda":
        return moments.numpy
    copy = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
    copy.copy_(moments, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Moments:
        done.synchronize()
        array: Moments = copy.numpy()
        return array

    return wait
