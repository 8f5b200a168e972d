"""Images of tar shards through the image VAE's encoder, and their moments into files beside the shards.

Several processes share the shards without speaking to one another: each takes its part of those that have no file,
then helps with what is left. A draft that grows tells the others that a shard is being made.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.latents.progress import LatentProgress
from vdtrain.data.decode import DecodeError, decode
from vdtrain.data.latents import SUFFIX, LatentDescription, LatentFileWriter, LatentFolder, file_prefix
from vdtrain.data.manifest import Manifest, ShardRows
from vdtrain.data.shards import ShardReader

CENTRE = (0.5, 0.5)
DRAFTS = "drafts"
DRAFT_SUFFIX = ".incomplete"
# A draft that has not grown for so long is nobody's any more; an encoder on a CPU takes its time for a batch.
STALE_SECONDS = 120.0
POLL_SECONDS = 1.0

# Images uint8 [b, 3, R, R], on the CPU, to moments [b, ...] on any device.
Encoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Decoded:
    """Consecutive samples of a shard's file: images uint8 [b, 3, R, R], black where they are bad, and bool [b]."""

    shard: int
    images: Tensor
    bad: NDArray[np.bool_]


@dataclass(frozen=True)
class Made:
    """What one process has made."""

    shards: int
    images: int
    bad: int
    seconds: float


class LatentEncoding:
    """Makes the missing files of one resolution.

    Args:
        encode: with the weights and the precision that `description` tells of.
        batch_size: images that go through it together; a batch is of one shard.
        workers: decoding threads.
        rank, world_size: of the processes that share the work.
    """

    def __init__(
        self,
        folder: LatentFolder,
        manifest: Manifest,
        reader: ShardReader,
        description: LatentDescription,
        encode: Encoder,
        *,
        batch_size: int,
        workers: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._folder, self._manifest, self._reader = folder, manifest, reader
        self._description, self._encode, self._batch_size = description, encode, batch_size
        self._workers, self._rank, self._world_size = max(1, workers), rank, world_size
        self._drafts = folder.path / DRAFTS
        self._host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())

    def run(self) -> Made:
        """Make what is missing; the process of rank 0 returns when no other makes anything any more."""
        began, shards, images, bad = time.monotonic(), 0, 0, 0
        with ThreadPoolExecutor(self._workers, thread_name_prefix="decode") as pool, self._progress() as progress:
            try:
                while True:
                    missing = self._folder.missing(self._manifest, self._description.min_side)
                    being_made = self._being_made()
                    free = [shard for shard in missing if self._path(shard).name not in being_made]
                    own = free[self._rank :: self._world_size]
                    if own:
                        progress.expect(int(self._manifest.counts(self._description.min_side)[own].sum()))
                        for count, bad_count in self._make(own, pool, progress):
                            shards, images, bad = shards + 1, images + count, bad + bad_count
                    elif missing and self._rank == 0:
                        time.sleep(POLL_SECONDS)
                    else:
                        break
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        if self._rank == 0:
            self._remove_leftovers()
        return Made(shards, images, bad, time.monotonic() - began)

    def _progress(self) -> LatentProgress:
        return LatentProgress(self._description.resolution, self._world_size, silent=self._rank != 0)

    def _make(self, shards: list[int], pool: ThreadPoolExecutor, progress: LatentProgress) -> Iterator[tuple[int, int]]:
        """Encode shards one after another; numbers of samples and of bad ones for every shard that is made."""
        writer: LatentFileWriter | None = None
        written = 0
        try:
            for rows, batch, moments in self._encoded(self._decoded(shards, pool)):
                if writer is None:
                    writer, written = self._writer(batch.shard, rows), 0
                # What overflows the file's precision would poison a training run.
                bad = batch.bad | ~np.isfinite(moments).all(axis=tuple(range(1, moments.ndim)))
                moments[bad] = 0
                writer.bad[written : written + len(bad)] = bad
                writer.write(moments)
                written += len(bad)
                progress.add(len(bad))
                if written == len(writer.rows):
                    writer.close()
                    yield len(writer.rows), int(writer.bad.sum())
                    writer = None
        finally:
            if writer is not None:
                writer.abandon()

    def _decoded(self, shards: list[int], pool: ThreadPoolExecutor) -> Iterator[tuple[NDArray[np.int32], Decoded]]:
        """Batches of the shards in their order, decoded ahead by threads, and the rows of their whole shard."""
        ahead: deque[tuple[NDArray[np.int32], Future[Decoded]]] = deque()
        for shard in shards:
            path = self._path(shard)
            if path.exists() or path.name in self._being_made():
                continue
            samples = self._manifest.rows(shard)
            rows = np.flatnonzero(samples.side >= self._description.min_side).astype(np.int32)
            for first in range(0, len(rows), self._batch_size):
                some = rows[first : first + self._batch_size]
                ahead.append((rows, pool.submit(self._decode, shard, samples, some)))
                if len(ahead) > 2 * self._workers:
                    found, future = ahead.popleft()
                    yield found, future.result()
        for found, future in ahead:
            yield found, future.result()

    def _decode(self, shard: int, samples: ShardRows, rows: NDArray[np.int32]) -> Decoded:
        resolution = self._description.resolution
        pinned = torch.cuda.is_available()
        images = torch.zeros(len(rows), resolution, resolution, 3, dtype=torch.uint8, pin_memory=pinned)
        bad = np.zeros(len(rows), bool)
        for place, row in enumerate(rows):
            data = self._reader.read(shard, int(samples.offset[row]), int(samples.size[row]))
            try:
                images.numpy()[place] = decode(data, resolution, CENTRE, int(samples.orientation[row]))
            except DecodeError:
                bad[place] = True
        return Decoded(shard, images.permute(0, 3, 1, 2), bad)

    def _encoded(
        self, batches: Iterator[tuple[NDArray[np.int32], Decoded]]
    ) -> Iterator[tuple[NDArray[np.int32], Decoded, NDArray[np.float16]]]:
        """Moments of the batches, float16 on the CPU; the next batch is under way when they are waited for."""
        before: tuple[NDArray[np.int32], Decoded, Callable[[], NDArray[np.float16]]] | None = None
        for rows, batch in batches:
            arriving = _arriving(self._encode(batch.images).half())
            if before is not None:
                yield before[0], before[1], before[2]()
            before = rows, batch, arriving
        if before is not None:
            yield before[0], before[1], before[2]()

    def _path(self, shard: int) -> Path:
        return self._folder.path_of(self._manifest, shard)

    def _writer(self, shard: int, rows: NDArray[np.int32]) -> LatentFileWriter:
        path = self._path(shard)
        draft = self._drafts / f"{path.name}.{self._host}.{os.getpid()}{DRAFT_SUFFIX}"
        return LatentFileWriter(path, draft, self._description, self._manifest.hashes[shard], rows)

    def _being_made(self) -> set[str]:
        """Names of the files that other processes are about to make."""
        return {path.name.rsplit(".", 3)[0] for path in self._drafts.glob(f"*{DRAFT_SUFFIX}") if self._is_live(path)}

    def _is_live(self, draft: Path) -> bool:
        """Whether another process may still be writing it: one of this host is asked for, others are told by time."""
        _, host, number, _ = draft.name.rsplit(".", 3)
        if host == self._host:
            if int(number) == os.getpid():
                return False
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                return False
            except PermissionError:
                pass
        try:
            return time.time() - draft.stat().st_mtime < STALE_SECONDS
        except FileNotFoundError:
            return False

    def _remove_leftovers(self) -> None:
        """Drafts of processes that were killed, and latents of shards that have been made anew."""
        for draft in self._drafts.glob(f"*{DRAFT_SUFFIX}"):
            if not self._is_live(draft):
                draft.unlink(missing_ok=True)
        kept = {self._path(shard).name for shard in range(len(self._manifest.paths))}
        prefixes = {file_prefix(path) for path in self._manifest.paths}
        for name in self._folder.names() - kept:
            if name.endswith(SUFFIX) and name.rpartition("-")[0] + "-" in prefixes:
                (self._folder.path / name).unlink(missing_ok=True)


def _arriving(moments: Tensor) -> Callable[[], NDArray[np.float16]]:
    """Send moments to the CPU; the call waits for them."""
    if moments.device.type != "cuda":
        return moments.numpy
    copy = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
    copy.copy_(moments, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> NDArray[np.float16]:
        done.synchronize()
        array: NDArray[np.float16] = copy.numpy()
        return array

    return wait
