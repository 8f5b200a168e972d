"""The order of training samples: a pure function of seed and position, for any number of ranks and workers.

An epoch puts the shards in a random order. It cuts this line of samples into equal interleaved streams, the *lanes*.
Each lane is read from start to end, and its samples are shuffled inside blocks. The lanes take turns sample by sample.
A batch therefore mixes samples from as many distant shards as there are lanes. A rank takes some of the lanes, and so
reads few shards at a time. A set that fits into one block has one lane and is shuffled as a whole.

A fixed pattern mixes weighted sources. Each source has its own epochs, whose pace follows its weight.

A hash of a pair's name decides whether the pair is held out of training, in every stream and on every machine alike.
The name is the file name of the pair's tar and the pair's key there. Folders and addresses do not count, so that shards
may move.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vdtrain.data.manifest import Manifest, ShardRows
from vdtrain.run.pulse import moved

# The file name of a tar in a path, an address with a query, or a command.
TAR_NAME = re.compile(r"[^/\s?#]+\.tar(?:\.\w+)?(?=$|[\s?#])")
THREADS = 4


def is_held_out(name: str, share: float) -> bool:
    """Whether the pair of this name takes no part in training.

    Args:
        name: see `pair_name`.
        share: of all pairs that is held out, from 0 to 1. The pairs of a smaller share are among those of a larger one.
    """
    digest = hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def pair_name(tar: str, key: str) -> str:
    """The name of a pair, from the path or address of its tar and its key there."""
    found = TAR_NAME.findall(tar)
    return f"{found[-1] if found else tar.rpartition('/')[2]}/{key}"


@dataclass(frozen=True)
class Split:
    """One side of the split of a set's pairs."""

    share: float = 0.0  # of the pairs that is held out; 0 splits nothing
    held_out: bool = False  # the held-out pairs, instead of those to train on

    def takes(self, tar: str, keys: Sequence[str]) -> NDArray[np.bool_]:
        """[n] Whether the pairs with these keys in a tar are on this side."""
        if self.share == 0:
            return np.ones(len(keys), np.bool_)
        prefix = pair_name(tar, "")
        held = np.fromiter((is_held_out(prefix + key, self.share) for key in keys), np.bool_, len(keys))
        return held if self.held_out else ~held

    def rows(
        self, tar: str, rows: ShardRows, min_side: int, partial: bool = False, need: Sequence[str] = ()
    ) -> NDArray[np.int64]:
        """Numbers of a shard's rows on this side whose shortest side has `min_side` pixels or more.

        Args:
            partial: also samples that lack their image or their caption.
            need: modalities that a sample must have nevertheless.
        """
        taken = (rows.side >= max(1, min_side)) | (partial & (rows.side == 0))
        for modality in need:
            taken &= rows.has(modality)
        large = np.flatnonzero(taken)
        return large if self.share == 0 else large[self.takes(tar, rows.keys.take(large).to_pylist())]

    def counts(
        self, manifest: Manifest, min_side: int, partial: bool = False, need: Sequence[str] = ()
    ) -> NDArray[np.int64]:
        """int64 [S]: number of `rows` of each shard. A split, or a need, reads the rows of all shards, once.

        Raises:
            ManifestError: they are missing or damaged.
        """
        found = manifest.counts(min_side)
        if partial:
            found += manifest.partial()
        if self.share == 0 and not need:
            return found

        def count(shard: int) -> int:
            rows = manifest.rows(shard)
            moved()  # a large set takes longer than the watchdog waits
            return len(self.rows(manifest.paths[shard], rows, min_side, partial, need))

        shards = np.flatnonzero(found)
        with ThreadPoolExecutor(THREADS) as pool:
            found[shards] = list(pool.map(count, shards.tolist()))
        return found


Integers = NDArray[np.int64]

# The pattern of sources repeats after this many positions, so a weight is exact to one part in as many.
PATTERN = 10_000


@dataclass(frozen=True)
class Places:
    """The samples at n positions."""

    shard: Integers  # int64 [n] number of the shard
    sample: Integers  # int64 [n] number among those of the shard's samples that take part
    lane: Integers  # int64 [n] number of the lane; sources share no lanes

    def __getitem__(self, rows: Integers | slice) -> Places:
        return Places(self.shard[rows], self.sample[rows], self.lane[rows])


class Order:
    """The order of a whole training phase, over endless epochs.

    Args:
        pools: for every weighted source, int64 arrays (shards, counts): the numbers of its shards, and how many samples
            of each take part. Without weights, one pool holds all shards.
        weights: of the pools, in any scale. A pool of weight 0 is left out.
        seed: of all shuffles.
        lanes: largest number of interleaved streams.
        block: samples of a lane that are shuffled among each other.

    Raises:
        ValueError: a pool that takes part has no samples, `lanes` or `block` is below 1, or a weight is too small for
            the pattern.
    """

    def __init__(
        self,
        pools: Sequence[tuple[Integers, Integers]],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        lanes: int = 64,
        block: int = 32_768,
    ) -> None:
        shares = [1.0] * len(pools) if weights is None else weights
        # A pool keeps its number, and with it its order, when another one is left out.
        part = [(number, pools[number]) for number, share in enumerate(shares) if share != 0]
        if any(counts.sum() == 0 for _, (_, counts) in part):
            raise ValueError("a source has no samples; remove it")
        if lanes < 1 or block < 1:
            raise ValueError(f"lanes={lanes}, block={block}: both must be at least 1")
        self.pattern = pattern([share for share in shares if share != 0])
        self.pools = [
            Pool(shards[counts > 0], counts[counts > 0], (seed, number), lanes, block)
            for number, (shards, counts) in part
        ]
        self._first_lanes = np.cumsum([0, *(pool.lanes for pool in self.pools)])
        # For each p, how many of the pattern's first p positions belong to each pool.
        belongs = self.pattern[:, None] == np.arange(len(part))
        self._before: Integers = np.concatenate([np.zeros((1, len(part)), np.int64), belongs.cumsum(axis=0)])

    def __len__(self) -> int:
        """Samples in all pools that take part."""
        return sum(pool.samples for pool in self.pools)

    def locate(self, positions: Integers) -> Places:
        """The samples at global positions, int64 [n]."""
        rounds, places = np.divmod(positions, len(self.pattern))
        pools = self.pattern[places]
        found = Places(*(np.empty(len(positions), np.int64) for _ in range(3)))
        for number, pool in enumerate(self.pools):
            own = np.flatnonzero(pools == number)
            if len(own) == 0:
                continue
            inside = rounds[own] * self._before[-1, number] + self._before[places[own], number]
            located = pool.locate(inside)
            found.shard[own], found.sample[own] = located.shard, located.sample
            found.lane[own] = located.lane + self._first_lanes[number]
        return found

    def batch(self, number: int, size: int) -> tuple[Integers, Places]:
        """Positions of a batch, int64 [size], and their samples, sorted by lane so that neighbours share shards."""
        positions = np.arange(number * size, (number + 1) * size, dtype=np.int64)
        places = self.locate(positions)
        by_lane = np.argsort(places.lane, kind="stable")
        return positions[by_lane], places[by_lane]


class Pool:
    """The order of samples that share their epochs; arguments as in `Order`, with several numbers as seed."""

    def __init__(self, shards: Integers, counts: Integers, seed: tuple[int, ...], lanes: int, block: int) -> None:
        self.shards, self.counts, self.seed, self.block = shards, counts, seed, block
        self.samples = int(counts.sum())
        self.lanes = max(1, min(lanes, self.samples // block))
        self._line = lru_cache(2)(self._new_line)
        self._shuffled = lru_cache(2 * self.lanes)(self._new_block)

    def locate(self, positions: Integers) -> Places:
        """The samples at positions int64 [n], which count over this pool's epochs."""
        epochs, inside = np.divmod(positions, self.samples)
        places = Places(*(np.empty(len(positions), np.int64) for _ in range(3)))
        for epoch in np.unique(epochs):
            own = np.flatnonzero(epochs == epoch)
            found = self._locate(int(epoch), inside[own])
            places.shard[own], places.sample[own], places.lane[own] = found.shard, found.sample, found.lane
        return places

    def _locate(self, epoch: int, positions: Integers) -> Places:
        order, ends = self._line(epoch)
        steps, lanes = np.divmod(positions, self.lanes)
        blocks = (steps + self._lead(lanes)) // self.block
        line = np.empty(len(positions), np.int64)
        for both in np.unique(np.stack([lanes, blocks]), axis=1).T:
            lane, block = int(both[0]), int(both[1])
            own = np.flatnonzero((lanes == lane) & (blocks == block))
            first, shuffled = self._shuffled(epoch, lane, block)
            line[own] = self._lane_start(lane) + first + shuffled[steps[own] - first]
        turns = np.searchsorted(ends, line, side="right")
        counts = self.counts[order[turns]]
        return Places(self.shards[order[turns]], line - (ends[turns] - counts), lanes)

    def _lane_start(self, lane: int) -> int:
        """First sample of a lane. Lane lengths differ by at most one sample; the longer lanes come first."""
        length, longer = divmod(self.samples, self.lanes)
        return lane * length + min(lane, longer)

    def _new_line(self, epoch: int) -> tuple[Integers, Integers]:
        """The order of an epoch's shards, and the end of each shard in the line of samples."""
        order = _generator(*self.seed, epoch).permutation(len(self.shards))
        return order, np.cumsum(self.counts[order])

    def _lead(self, lane: Any) -> Any:
        """How many samples a lane's first block lacks, so that lanes reach their next shards at different times."""
        return lane * self.block // self.lanes

    def _new_block(self, epoch: int, lane: int, block: int) -> tuple[int, Integers]:
        """The start of a block in its lane, and the order of its samples."""
        first = max(0, block * self.block - self._lead(lane))
        end = min((block + 1) * self.block - self._lead(lane), self._lane_start(lane + 1) - self._lane_start(lane))
        return first, _generator(*self.seed, epoch, lane, block).permutation(end - first)


def pattern(weights: Sequence[float]) -> Integers:
    """int64 [PATTERN]: the pool of each position; every part of the pattern keeps the weights.

    Raises:
        ValueError: a weight is not above 0, or too small to get a position.
    """
    shares = np.asarray(weights, np.float64)
    if not (shares > 0).all() or (shares / shares.sum() * PATTERN < 0.5).any():
        raise ValueError(f"weights={list(weights)}: each must be above 0, and above 1/{2 * PATTERN} of their sum")
    if len(shares) == 1:
        return np.zeros(1, np.int64)
    shares = shares / shares.sum()
    given = np.zeros(len(shares))
    places = np.empty(PATTERN, np.int64)
    for place in range(PATTERN):
        places[place] = np.argmax(shares * (place + 1) - given)
        given[places[place]] += 1
    return places


def uniform(seed: int, positions: Integers, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), float64 [n, count], that depend only on seed and position (the SplitMix64 generator)."""
    counters = np.add(positions[:, None] * count, np.arange(1, count + 1)).astype(np.uint64)
    (start,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    # Overflow is intended: the arithmetic is modulo 2**64.
    with np.errstate(over="ignore"):
        state: NDArray[np.uint64] = np.multiply(counters, np.uint64(0x9E3779B97F4A7C15)) + start
        state = np.multiply(_scrambled(state, 30), np.uint64(0xBF58476D1CE4E5B9))
        state = np.multiply(_scrambled(state, 27), np.uint64(0x94D049BB133111EB))
    mantissa = np.right_shift(_scrambled(state, 31), np.uint64(11))
    return mantissa.astype(np.float64) * 2.0**-53


def _scrambled(state: NDArray[np.uint64], shift: int) -> NDArray[np.uint64]:
    return np.bitwise_xor(state, np.right_shift(state, np.uint64(shift)))


def _generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
