"""Batches of image-text pairs from tar shards, in an order that is a pure function of seed and position.

The global batch g of size B holds the positions gB ... (g + 1)B - 1 of an endless `Order`. Each rank takes a contiguous
part of it. No sample is dropped or repeated as padding: the next epoch fills the last batch of an epoch. A run resumes
at any position, on any number of ranks, from a single number.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vdtrain.data.batch import Batch, BatchMemory
from vdtrain.data.decode import DecodeError, decode_into
from vdtrain.data.latents import LatentShards
from vdtrain.data.manifest import Manifest, ManifestError, ShardRows
from vdtrain.data.order import Integers, Order, Places, uniform
from vdtrain.data.shards import INDEX_AGAIN, ShardCache, ShardReader, StreamError

__all__ = ["PairStream", "StreamError"]

# How many samples are tried for one position, and how many bad samples are tolerated beyond `bad_share`.
BAD_ALLOWANCE = 10
# Samples whose manifest rows stay in memory, about 100 bytes each.
KEPT_ROWS = 4_000_000
# Most samples that a thread decodes in one task; fewer if a batch gives each thread less than two tasks.
CHUNK = 32
CENTRE = (0.5, 0.5)
DECODE = "index the shards again with `python -m data_pipeline index data.index.decode=true`"
FETCH = "remove the shard, whose disk may have changed it, and download it again: `python -m data_pipeline download`"


class PairStream:
    """Image-text pairs, {"image": uint8 [b, 3, R, R], "text": b captions}, decoded ahead by threads; a `BatchStream`.

    Args:
        manifest: folder written by `python -m data_pipeline index`.
        seed: of the order and of the crops.
        resolution: R, side of the images in pixels.
        global_batch_size: pairs per step over all ranks.
        start: position of the first pair, a multiple of the global batch size.
        workers: decoding threads.
        prefetch: batches kept ready beyond the current one.
        min_side: images with a shorter side are omitted; the resolution by default.
        random_crop: crop at a random position (a function of seed and position), else at the centre.
        weights: by source, its share of the mixture; each source has its own epochs. None treats all sources as one.
            Every sample comes once per epoch.
        lanes: interleaved streams of the shuffle, see `vdtrain.data.order`.
        block: samples of a lane that are shuffled among each other.
        bad_share: the stream stops if a larger share of samples is bad. The next good sample of the shard replaces a
            bad one.
        shard_root: folder or address (http, https, s3, gs, ...) that the manifest's shard paths are relative to; the
            manifest's own folder by default.
        cache: {folder, gigabytes} for whole copies of remote shards on this machine (`vdtrain.data.shards`).
        latents: folder of cached moments (`python -m data_pipeline latents`), delivered with each batch.

    Raises:
        ManifestError: the manifest is missing, no image is large enough, or an argument is invalid.
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
        weights: Mapping[str, float] | None = None,
        lanes: int = 64,
        block: int = 32_768,
        bad_share: float = 0.01,
        shard_root: str | None = None,
        cache: Mapping[str, Any] | None = None,
        latents: str | None = None,
    ) -> None:
        if global_batch_size % world_size or start % global_batch_size:
            raise ValueError(f"batch {global_batch_size}, {world_size} ranks, start {start}: must divide evenly")
        self.manifest = Manifest(manifest, shard_root)
        self.identity = self.manifest.identity
        self.min_side = resolution if min_side is None else min_side
        if not 0 <= bad_share <= 1:
            raise ManifestError(f"data.stream.bad_share={bad_share}: must be from 0 to 1")
        pools, shares = self._pools(weights)
        try:
            self.order = Order(pools, shares, seed=seed, lanes=lanes, block=block)
        except ValueError as error:
            raise ManifestError(f"data.stream: {error}") from error
        self.seed, self.resolution, self.random_crop, self.bad_share = seed, resolution, random_crop, bad_share
        self.global_batch_size = global_batch_size
        self.local_batch_size = global_batch_size // world_size
        self.rank, self.next_batch, self.prefetch = rank, start // global_batch_size, prefetch
        self.replaced: Counter[str] = Counter()
        self._delivered = 0
        self._reader = ShardReader(self.manifest, ShardCache.of(cache))
        self._moments: LatentShards | None = None
        if latents is not None:
            self._moments = LatentShards(latents, self.manifest, resolution, min_side=self.min_side)
        workers = max(1, workers)
        self._chunk = max(1, min(CHUNK, self.local_batch_size // (2 * workers)))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._memory = BatchMemory()
        self._pending: deque[_Loading] = deque()
        self._rows: OrderedDict[int, tuple[ShardRows, Integers]] = OrderedDict()
        self._kept_rows = 0
        self._lock = Lock()

    def __len__(self) -> int:
        """Number of samples that take part; each comes once per epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            while len(self._pending) <= self.prefetch:
                self._pending.append(self._begin(self.next_batch))
                self.next_batch += 1
            batch = self._pending.popleft().result()
            self._delivered += self.local_batch_size
            self.replaced.update(batch.replaced)
            bad = sum(self.replaced.values())
            if bad > BAD_ALLOWANCE + self.bad_share * self._delivered:
                remedy = f"raise data.stream.bad_share, or {DECODE}"
                if self.manifest.decoded():
                    remedy = f"indexing decoded all of them: raise data.stream.bad_share, or {FETCH}"
                raise StreamError(
                    f"{bad} of {self._delivered} samples were bad ({dict(self.replaced)}), above "
                    f"data.stream.bad_share={self.bad_share:g}; {remedy}"
                )
            yield batch

    def close(self) -> None:
        """Stop the threads and close the shards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def _pools(self, weights: Mapping[str, float] | None) -> tuple[list[tuple[Integers, Integers]], list[float] | None]:
        counts = self.manifest.counts(self.min_side)
        setting = f"data.manifest={self.manifest.folder}"
        large = f"has a side of {self.min_side} pixels or more"
        if counts.sum() == 0:
            raise ManifestError(
                f"{setting}: none of {len(self.manifest)} images {large}; lower the phase's resolution or index more "
                "shards"
            )
        numbers = np.arange(len(counts), dtype=np.int64)
        if weights is None:
            return [(numbers, counts)], None
        names = self.manifest.source_names
        if set(weights) != set(names):
            raise ManifestError(
                f"data.stream.weights={dict(weights)}: {setting} has the sources {', '.join(names)}; give each a weight"
            )
        pools = []
        for source, name in enumerate(names):
            own = numbers[self.manifest.sources == source]
            if counts[own].sum() == 0:
                raise ManifestError(
                    f"data.stream.weights: no image of {name} {large}; lower the phase's resolution or remove "
                    "the source from the manifest"
                )
            pools.append((own, counts[own]))
        return pools, [weights[name] for name in names]

    def _begin(self, number: int) -> _Loading:
        """Let the threads load this rank's part of a global batch."""
        positions, places = self.order.batch(number, self.global_batch_size)
        own = slice(self.rank * self.local_batch_size, (self.rank + 1) * self.local_batch_size)
        moments = None if self._moments is None else (self.local_batch_size, *self._moments.shape)
        loading = _Loading(self._memory, positions[own], self.resolution, moments)
        crops = np.full((self.local_batch_size, 2), CENTRE)
        if self.random_crop and self._moments is None:
            crops = uniform(self.seed, positions[own], 2)
        for first in range(0, self.local_batch_size, self._chunk):
            rows = slice(first, min(first + self._chunk, self.local_batch_size))
            chunk = places[own][rows]
            loading.chunks.append(self._pool.submit(self._load, loading, first, chunk, crops[rows]))
        return loading

    def _load(self, loading: _Loading, first: int, places: Places, crops: NDArray[np.float64]) -> None:
        each = zip(places.shard.tolist(), places.sample.tolist(), crops.tolist(), strict=True)
        for place, (shard, sample, (top, left)) in enumerate(each, first):
            self._load_one(loading, place, shard, sample, (top, left))

    def _load_one(self, loading: _Loading, place: int, shard: int, sample: int, crop: tuple[float, float]) -> None:
        """Write a sample into its row of the batch; the next good sample of its shard replaces a bad one."""
        rows, taking_part = self._samples(shard)
        for step in range(min(BAD_ALLOWANCE, len(taking_part))):
            row = taking_part.item((sample + step) % len(taking_part))
            try:
                if self._moments is not None:
                    if self._moments.is_bad(shard, row):
                        raise DecodeError("no latent: it could not be decoded")
                    self._moments.read(shard, np.array([row]), loading.moments["image"][place : place + 1])
                data = self._reader.read(shard, rows.offset.item(row), rows.size.item(row))
                decode_into(loading.arrays[place], data, crop, rows.orientation.item(row))
            except DecodeError as error:
                loading.replaced.append(str(error).split(":")[0])
                continue
            loading.captions[place] = rows.captions[row].as_py()
            return
        raise StreamError(
            f"{self.manifest.shards[shard]}: {BAD_ALLOWANCE} samples in a row from number {sample} are bad; "
            f"{self._bad_remedy(shard)}"
        )

    def _bad_remedy(self, shard: int) -> str:
        """The remedy for a shard of bad samples. Indexing again skips a shard that has not changed."""
        if self.manifest.changed(shard):
            return f"it has changed since it was indexed: {INDEX_AGAIN}"
        return f"indexing decoded all of it: {FETCH}" if self.manifest.decoded(shard) else DECODE

    def _samples(self, shard: int) -> tuple[ShardRows, Integers]:
        """A shard's rows in the manifest, and the int64 numbers of the rows that take part."""
        with self._lock:
            if shard in self._rows:
                self._rows.move_to_end(shard)
                return self._rows[shard]
        rows = self.manifest.rows(shard)
        found = rows, np.flatnonzero(rows.side >= self.min_side)
        with self._lock:
            if shard not in self._rows:
                self._rows[shard] = found
                self._kept_rows += len(rows)
                while self._kept_rows > KEPT_ROWS and len(self._rows) > 1:
                    _, (oldest, _) = self._rows.popitem(last=False)
                    self._kept_rows -= len(oldest)
        return found


class _Loading:
    """A batch whose rows the threads fill."""

    def __init__(
        self, memory: BatchMemory, positions: Integers, resolution: int, moments: tuple[int, ...] | None
    ) -> None:
        count = len(positions)
        self.positions = positions
        self.images = memory.take((count, resolution, resolution, 3), torch.uint8)
        self.arrays: NDArray[np.uint8] = self.images.numpy()
        self.moments = {} if moments is None else {"image": memory.take(moments, torch.float16)}
        self.captions: list[str] = [""] * count
        self.replaced: list[str] = []
        self.chunks: list[Future[None]] = []

    def result(self) -> Batch:
        # This wakes once, not for every chunk.
        wait(self.chunks, return_when=FIRST_EXCEPTION)
        for chunk in self.chunks:
            chunk.result()
        samples = {"image": self.images.permute(0, 3, 1, 2), "text": self.captions}
        return Batch(samples, torch.from_numpy(self.positions), self.moments, Counter(self.replaced))
