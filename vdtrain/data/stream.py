"""Batches of image-text pairs from tar shards, in an order that is a pure function of seed and position.

The global batch g of size B holds the positions gB ... (g + 1)B - 1 of an endless `Order`. Each rank takes a contiguous
part of it. No sample is dropped or repeated as padding: the next epoch fills the last batch of an epoch. A run resumes
at any position, on any number of ranks, from a single number.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vdtrain.config.instantiate import instantiate
from vdtrain.data.batch import Batch, BatchMemory
from vdtrain.data.decode import CENTRE, DecodeError, decode_into
from vdtrain.data.latents import LatentShards
from vdtrain.data.manifest import ManifestError, ShardRows, downloaded
from vdtrain.data.order import Integers, Order, Places, Split, uniform
from vdtrain.data.shards import ShardReader
from vdtrain.errors import one_line
from vdtrain.storage.patience import PATIENCE_SECONDS, Patience, StreamError
from vdtrain.storage.stores import TIMEOUT_SECONDS

__all__ = ["PairStream", "StreamError"]

logger = logging.getLogger(__name__)

# How many samples are tried for one position, and how many bad samples are tolerated beyond `bad_share`.
BAD_ALLOWANCE = 10
# Bad samples that the log names, and that the error which stops a run names.
LOGGED, NAMED = 10, 3
# Samples whose manifest rows stay in memory, about 100 bytes each.
KEPT_ROWS = 4_000_000
# Most samples that a thread decodes in one task; fewer if a batch gives each thread less than two tasks.
CHUNK = 32
DECODE = (
    "index the shards again with `python -m data_pipeline index data.index.decode=true` and the same settings of data"
)
RESTORE = "its disk may have changed the shard: put a whole copy in its place, and index again"
FETCH = "remove the shard, whose disk may have changed it, and download it again: `python -m data_pipeline download`"


class BadSample(NamedTuple):
    """A sample that cannot be used: numbers of its shard and of its row there, and why."""

    shard: int
    row: int
    error: DecodeError


class PairStream:
    """Image-text pairs, {"image": uint8 [b, 3, R, R], "text": b captions}, decoded ahead by threads; a `BatchStream`.

    With `members`, samples may have files of further modalities, and may lack any modality (`Batch.rows`).

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
        weights: by source, its share of the mixture; each source has its own epochs. A source with 0 or without an
            entry is left out. None treats all sources as one, whose every sample comes once per epoch.
        lanes: interleaved streams of the shuffle, see `vdtrain.data.order`.
        block: samples of a lane that are shuffled among each other.
        bad_share: the stream stops if a larger share of samples is bad. The next good sample of the shard replaces a
            bad one.
        shard_root: folder or address (http, https, s3, gs, ...) that the manifest's shard paths are relative to; the
            manifest's own folder by default.
        follow: kinds of addresses that the manifest's own paths may be (`vdtrain.storage.stores`).
        cache: {folder, gigabytes} for whole copies of remote shards on this machine (`vdtrain.data.shards`).
        timeout: seconds for one read of a remote shard.
        patience: seconds for which a read is repeated whose error may pass.
        latents: folder of cached moments (`python -m data_pipeline latents`), delivered with each batch.
        split: which side of the split into held-out pairs and the others takes part (`vdtrain.data.order`).
        members: by modality beside images and captions, what reads its files: a `_target_` with its arguments, which
            make a function of a file's bytes. It returns a tensor of one shape, or any other sample.
        need: with `members`, modalities that every sample must have; the others are left out.

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
        follow: Sequence[str] = (),
        cache: Mapping[str, Any] | None = None,
        timeout: float = TIMEOUT_SECONDS,
        patience: float = PATIENCE_SECONDS,
        latents: str | None = None,
        split: Split | None = None,
        members: Mapping[str, Mapping[str, Any]] | None = None,
        need: Sequence[str] = (),
    ) -> None:
        if global_batch_size % world_size or start % global_batch_size:
            raise ValueError(f"batch {global_batch_size}, {world_size} ranks, start {start}: must divide evenly")
        self.patience = Patience(patience)
        self.reader = ShardReader.open(
            manifest, shard_root=shard_root, follow=follow, cache=cache, timeout=timeout, patience=self.patience
        )
        self.manifest = self.reader.manifest
        self.identity = self.manifest.identity
        self.min_side = resolution if min_side is None else min_side
        self.split = split or Split()
        self.members: dict[str, Callable[[bytes], Any]] = {
            name: instantiate(specification, f"data.stream.members.{name}")
            for name, specification in (members or {}).items()
        }
        self.need = tuple(need)
        self._check_members()
        if not 0 <= bad_share <= 1:
            raise ManifestError(f"data.stream.bad_share={bad_share}: must be from 0 to 1")
        pools, shares = self._pools(weights)
        try:
            self.order = Order(pools, shares, seed=seed, lanes=lanes, block=block)
        except ValueError as error:
            raise ManifestError(f"data.stream: {error}") from error
        self.timeout = timeout
        # Those that take part.
        self.shards = np.concatenate([pool.shards for pool in self.order.pools])
        self.seed, self.resolution, self.random_crop, self.bad_share = seed, resolution, random_crop, bad_share
        self.global_batch_size = global_batch_size
        self.local_batch_size = global_batch_size // world_size
        self.rank, self.next_batch, self.prefetch = rank, start // global_batch_size, prefetch
        self.replaced: Counter[str] = Counter()
        self._last_bad: deque[BadSample] = deque(maxlen=NAMED)
        self._delivered = 0
        self._moments: LatentShards | None = None
        if latents is not None:
            opened = partial(LatentShards, latents, self.manifest, resolution, min_side=self.min_side)
            self._moments = self.patience.keep(latents, lambda: opened(shards=self.shards.tolist()))
        workers = max(1, workers)
        self._chunk = max(1, min(CHUNK, self.local_batch_size // (2 * workers)))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._memory = BatchMemory()
        self._pending: deque[_Loading] = deque()
        self._rows: OrderedDict[int, tuple[ShardRows, Integers]] = OrderedDict()
        self._kept_rows = 0
        self._lock = Lock()

    def _check_members(self) -> None:
        """Raise a ManifestError for a modality that was not indexed."""
        indexed = self.manifest.modalities if self.members else []
        for name in self.members:
            if name not in indexed:
                raise ManifestError(
                    f"data.stream.members.{name}: data.manifest={self.manifest.folder} has the further modalities "
                    f"{', '.join(indexed) or 'none'}; index its shards with data.index.members.{name}=[ENDING]"
                )

    def __len__(self) -> int:
        """Number of samples that take part; each comes once per epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            while len(self._pending) <= self.prefetch:
                self._pending.append(self._begin(self.next_batch))
                self.next_batch += 1
            loading = self._pending.popleft()
            batch = loading.result()
            self._delivered += self.local_batch_size
            for each in sorted(loading.bad, key=lambda bad: bad[:2]):
                if sum(self.replaced.values()) < LOGGED:
                    logger.warning("bad sample, replaced: %s", self._named([each]))
                self.replaced[each.error.reason] += 1
                self._last_bad.append(each)
            bad = sum(self.replaced.values())
            if bad > BAD_ALLOWANCE + self.bad_share * self._delivered:
                remedy = f"raise data.stream.bad_share, or {DECODE}"
                if self.manifest.decoded():
                    whole = _whole_again(self.manifest.shards)
                    remedy = f"indexing decoded all of them: raise data.stream.bad_share, or {whole}"
                raise StreamError(
                    f"{bad} of {self._delivered} samples were bad ({dict(self.replaced)}), above "
                    f"data.stream.bad_share={self.bad_share:g}; {remedy}; the last were {self._named(self._last_bad)}"
                )
            yield batch

    def names(self, number: int) -> list[str]:
        """The names of a global batch's samples, before anything is decoded: see `Batch.names`."""
        _, places = self.order.batch(number, self.global_batch_size)
        found = []
        for shard, sample in zip(places.shard.tolist(), places.sample.tolist(), strict=True):
            rows, taking_part = self._samples(shard)
            found.append(self._name(shard, rows, taking_part.item(sample)))
        return found

    def _name(self, shard: int, rows: ShardRows, row: int) -> str:
        """SHARD/KEY, where SHARD is the shard's path in the manifest without its ending."""
        return f"{self.manifest.paths[shard].removesuffix('.tar')}/{rows.keys[row].as_py()}"

    def close(self) -> None:
        """Stop the threads and close the shards."""
        self.patience.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.reader.close()
        if self._moments is not None:
            self._moments.close()

    def _pools(self, weights: Mapping[str, float] | None) -> tuple[list[tuple[Integers, Integers]], list[float] | None]:
        counts = self.split.counts(self.manifest, self.min_side, bool(self.members), self.need)
        setting = f"data.manifest={self.manifest.folder}"
        large = f"has a side of {self.min_side} pixels or more"
        if counts.sum() == 0 and self.split.share > 0:
            side, remedy = ("none", "raise") if self.split.held_out else ("each", "lower")
            raise ManifestError(
                f"data.validation.share={self.split.share}: {side} of the {len(self.manifest)} pairs of {setting} is "
                f"held out; {remedy} it, or index more shards"
            )
        if counts.sum() == 0 and self.need:
            raise ManifestError(
                f"data.stream.need=[{', '.join(self.need)}]: no sample of {setting} has all of them; need fewer"
            )
        if counts.sum() == 0:
            raise ManifestError(
                f"{setting}: none of {len(self.manifest)} images {large}; lower the phase's resolution or index more "
                "shards"
            )
        numbers = np.arange(len(counts), dtype=np.int64)
        if weights is None:
            return [(numbers, counts)], None
        names, given = self.manifest.source_names, f"data.stream.weights={weights}"
        if not isinstance(weights, Mapping) or not set(weights) <= set(names):
            raise ManifestError(f"{given}: {setting} has the sources {', '.join(names)}; give weights to them alone")
        shares = [weights.get(name, 0) for name in names]
        if not all(_is_weight(share) for share in shares) or not any(shares):
            raise ManifestError(f"{given}: give numbers of at least 0, one of them above 0")
        pools = []
        for source, name in enumerate(names):
            own = numbers[self.manifest.sources == source]
            if shares[source] and counts[own].sum() == 0:
                raise ManifestError(
                    f"{given}: no image of {name} {large}; lower the phase's resolution, or set its weight to 0"
                )
            pools.append((own, counts[own]))
        return pools, shares

    def _begin(self, number: int) -> _Loading:
        """Let the threads load this rank's part of a global batch."""
        positions, places = self.order.batch(number, self.global_batch_size)
        own = slice(self.rank * self.local_batch_size, (self.rank + 1) * self.local_batch_size)
        moments = None if self._moments is None else (self.local_batch_size, *self._moments.shape)
        loading = _Loading(self._memory, positions[own], self.resolution, moments, list(self.members))
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
        bad = []
        for step in range(min(BAD_ALLOWANCE, len(taking_part))):
            row = taking_part.item((sample + step) % len(taking_part))
            try:
                if not rows.pictured[row]:
                    self._load_members(loading, place, shard, rows, row)
                    break
                if self._moments is not None and rows.side[row] == 0:
                    raise StreamError(
                        f"data.latents=cached: {self._name(shard, rows, row)} is an image without a caption, which has "
                        "no latent; choose inline, or leave such samples out by data.stream.need=[text]"
                    )
                if self._moments is not None:
                    out = loading.moments["image"][place]
                    self.patience.keep(self._moments.name(shard), partial(self._moments.read, shard, row, out))
                orientation = rows.orientation.item(row)
                decoded = partial(decode_into, loading.arrays[place], crop=crop, orientation=orientation)
                self.reader.use(shard, rows, row, decoded)
                self._load_members(loading, place, shard, rows, row)
                break
            except DecodeError as error:
                bad.append(BadSample(shard, row, error))
        else:
            raise StreamError(
                f"{self.manifest.shards[shard]}: {BAD_ALLOWANCE} samples in a row from number {sample} are bad; "
                f"{self._bad_remedy(shard)}; the last were {self._named(bad[-NAMED:])}"
            )
        loading.bad += bad
        loading.replaced += [each.error.reason for each in bad]
        loading.pictured[place] = rows.pictured[row]
        loading.captions[place] = rows.captions[row].as_py()
        loading.names[place] = self._name(shard, rows, row)

    def _load_members(self, loading: _Loading, place: int, shard: int, rows: ShardRows, row: int) -> None:
        """Read the files of a sample's further modalities."""
        for modality, read in self.members.items():
            files = rows.of(modality)
            if files is None or files.size[row] < 0:
                loading.files[modality].pop(place, None)
                continue

            def decoded(data: Any, modality: str = modality, read: Callable[[bytes], Any] = read) -> Any:
                try:
                    return read(bytes(data))
                except Exception as error:  # whatever a reader of one's own raises, its file is bad
                    raise DecodeError(f"cannot read {modality}: {one_line(error)}") from error

            loading.files[modality][place] = self.reader.use(shard, files, row, decoded)

    def _named(self, bad: Iterable[BadSample]) -> str:
        """Shard, key and whole reason of each bad sample."""
        return ", ".join(
            f"{self.manifest.shards[shard]}, key {self._samples(shard)[0].keys[row]} ({one_line(error)})"
            for shard, row, error in bad
        )

    def _bad_remedy(self, shard: int) -> str:
        """The remedy for a shard of bad samples. Indexing again skips a shard that has not changed."""
        if self.manifest.decoded(shard):
            return f"indexing decoded all of it: {_whole_again([self.manifest.shards[shard]])}"
        return DECODE

    def _samples(self, shard: int) -> tuple[ShardRows, Integers]:
        """A shard's rows in the manifest, and the int64 numbers of the rows that take part."""
        with self._lock:
            if shard in self._rows:
                self._rows.move_to_end(shard)
                return self._rows[shard]
        rows = self.reader.rows(shard)
        path, partial = self.manifest.paths[shard], bool(self.members)
        found = rows, self.split.rows(path, rows, self.min_side, partial, self.need)
        with self._lock:
            if shard not in self._rows:
                self._rows[shard] = found
                self._kept_rows += len(rows)
                while self._kept_rows > KEPT_ROWS and len(self._rows) > 1:
                    _, (oldest, _) = self._rows.popitem(last=False)
                    self._kept_rows -= len(oldest)
        return found


def _whole_again(shards: Sequence[str]) -> str:
    """The remedy for damage in one of the shards: only what our download made can be downloaded again."""
    return FETCH if all(map(downloaded, shards)) else RESTORE


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


class _Loading:
    """A batch whose rows the threads fill."""

    def __init__(
        self,
        memory: BatchMemory,
        positions: Integers,
        resolution: int,
        moments: tuple[int, ...] | None,
        modalities: Sequence[str] = (),
    ) -> None:
        count = len(positions)
        self.positions = positions
        self.images = memory.take((count, resolution, resolution, 3), torch.uint8)
        self.arrays: NDArray[np.uint8] = self.images.numpy()
        self.moments = {} if moments is None else {"image": memory.take(moments, torch.float16)}
        self.captions: list[str] = [""] * count
        self.names: list[str] = [""] * count
        self.pictured = np.ones(count, np.bool_)
        # Samples of further modalities by their place.
        self.files: dict[str, dict[int, Any]] = {name: {} for name in modalities}
        # What was replaced, and its reasons.
        self.bad: list[BadSample] = []
        self.replaced: list[str] = []
        self.chunks: list[Future[None]] = []

    def result(self) -> Batch:
        # This wakes once, not for every chunk.
        wait(self.chunks, return_when=FIRST_EXCEPTION)
        for chunk in self.chunks:
            chunk.result()
        samples: dict[str, Any] = {"image": self.images.permute(0, 3, 1, 2), "text": self.captions}
        batch = Batch(samples, torch.from_numpy(self.positions), self.moments, Counter(self.replaced), self.names)
        return self._partial(batch) if self.files else batch

    def _partial(self, batch: Batch) -> Batch:
        """The batch with the further modalities, and each modality without the samples that lack it."""
        pictured, told = np.flatnonzero(self.pictured), np.flatnonzero([bool(text) for text in self.captions])
        rows = {"image": torch.from_numpy(pictured), "text": torch.from_numpy(told)}
        samples, moments = dict(batch.samples), dict(batch.moments)
        if len(pictured) < len(batch):
            samples["image"] = samples["image"][rows["image"]]
            moments = {name: each[rows["image"]] for name, each in moments.items()}
        samples["text"] = [self.captions[row] for row in told.tolist()]
        for name, files in self.files.items():
            there = sorted(files)
            rows[name], found = torch.tensor(there, dtype=torch.int64), [files[row] for row in there]
            shapes = {each.shape if isinstance(each, torch.Tensor) else None for each in found}
            if len(shapes) > 1:
                raise StreamError(
                    f"data.stream.members.{name}: its samples have different shapes ({', '.join(map(str, shapes))}); "
                    "return tensors of one shape, or lists"
                )
            samples[name] = found if None in shapes else torch.stack(found) if found else []
        return replace(batch, samples=samples, moments=moments, rows=rows)
