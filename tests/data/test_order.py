"""The order of samples: each comes once per epoch, for any shards, ranks, weights and stops."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.index.index import index
from tests.pairs import write_shard
from vdtrain.data.order import Order, pattern, uniform
from vdtrain.data.stream import PairStream

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


def order_of(pools: Sequence[Sequence[int]], weights: Sequence[float] | None, **settings: Any) -> Order:
    """An order over shards of the given sizes, numbered through all pools."""
    numbered, first = [], 0
    for sizes in pools:
        numbered.append((np.arange(first, first + len(sizes)), np.asarray(sizes, np.int64)))
        first += len(sizes)
    return Order(numbered, weights, **settings)


def read(order: Order, first: int, batches: int, size: int, ranks: int) -> list[list[tuple[int, int]]]:
    """Samples of the ranks' batches first, first + 1, ..."""
    found = []
    for number in range(first, first + batches):
        _, places = order.batch(number, size)
        share = size // ranks
        parts = [places[slice(rank * share, (rank + 1) * share)] for rank in range(ranks)]
        found.append([pair for part in parts for pair in zip(part.shard.tolist(), part.sample.tolist(), strict=True)])
    return found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    sizes=SIZES,
    seed=st.integers(0, 2**31),
    lanes=st.integers(1, 8),
    block=st.integers(1, 50),
    share=st.integers(1, 4),
    ranks=st.integers(1, 16),
    later_ranks=st.integers(1, 16),
    data=st.data(),
)
def test_every_sample_comes_once_per_epoch_though_the_run_stops_and_goes_on_with_other_ranks(
    sizes: list[int],
    seed: int,
    lanes: int,
    block: int,
    share: int,
    ranks: int,
    later_ranks: int,
    data: st.DataObject,
) -> None:
    size = share * int(np.lcm(ranks, later_ranks))
    total = sum(sizes)
    batches = -(-3 * total // size)
    stop = data.draw(st.integers(0, batches), "stop")
    made: dict[str, Any] = {"seed": seed, "lanes": lanes, "block": block}
    before = read(order_of([sizes], None, **made), 0, stop, size, ranks)
    after = read(order_of([sizes], None, **made), stop, batches - stop, size, later_ranks)
    whole = read(order_of([sizes], None, **made), 0, batches, size, 1)
    assert before + after == whole

    # Batches cross the ends of epochs. By position, each epoch holds every sample once.
    places = order_of([sizes], None, **made).locate(np.arange(3 * total))
    everything = sorted((shard, sample) for shard, count in enumerate(sizes) for sample in range(count))
    for epoch in range(3):
        own = places[slice(epoch * total, (epoch + 1) * total)]
        assert sorted(zip(own.shard.tolist(), own.sample.tolist(), strict=True)) == everything
    columns = _columns(order_of([sizes], None, **made), batches * size)
    by_position = list(zip(*(column.tolist() for column in columns), strict=True))
    for number, batch in enumerate(whole):
        # A batch holds its own positions, sorted by lane.
        assert sorted(batch) == sorted(by_position[number * size : (number + 1) * size])


def _columns(order: Order, positions: int) -> tuple[Any, Any]:
    places = order.locate(np.arange(positions))
    return places.shard, places.sample


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    pools=st.lists(SIZES, min_size=2, max_size=3),
    weights=st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
    seed=st.integers(0, 2**31),
    block=st.integers(1, 50),
)
def test_weighted_sources_keep_their_epochs_and_their_weights(
    pools: list[list[int]], weights: list[float], seed: int, block: int
) -> None:
    weights = weights[: len(pools)]
    order = order_of(pools, weights, seed=seed, block=block)
    positions = np.arange(5000)
    places, sources = order.locate(positions), order.pattern[positions % len(order.pattern)]
    first = 0
    for number, sizes in enumerate(pools):
        own = places[np.flatnonzero(sources == number)]
        pairs = list(zip((own.shard - first).tolist(), own.sample.tolist(), strict=True))
        everything = sorted((shard, sample) for shard, count in enumerate(sizes) for sample in range(count))
        for epoch in range(len(pairs) // len(everything)):
            assert sorted(pairs[epoch * len(everything) : (epoch + 1) * len(everything)]) == everything
        # Every part of the pattern keeps the weights, within one sample of each source.
        share = weights[number] / sum(weights)
        assert np.abs(np.cumsum(sources == number) - share * (positions + 1)).max() <= len(pools) + 0.5
        first += len(sizes)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    ranks=st.integers(1, 16),
    later_ranks=st.integers(1, 16),
    workers=st.integers(0, 8),
    later_workers=st.integers(0, 8),
    weight=st.none() | st.floats(0.1, 0.9),
    data=st.data(),
)
def test_streams_of_real_shards_stop_and_go_on_with_other_ranks_and_workers(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    ranks: int,
    later_ranks: int,
    workers: int,
    later_workers: int,
    weight: float | None,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    for source in ("first", "second"):
        (folder / source).mkdir()
        for number, count in enumerate(counts):
            write_shard(folder / source / f"{number:06d}.tar", count, seed=number, pixels=16)
    manifest = folder / "manifest"
    index({source: folder / source for source in ("first", "second")}, manifest)
    size = int(np.lcm(ranks, later_ranks))
    batches = max(2, -(-4 * sum(counts) // size))
    stop = data.draw(st.integers(0, batches), "stop")
    settings: dict[str, Any] = {
        "seed": 1,
        "resolution": 16,
        "global_batch_size": size,
        "weights": None if weight is None else {"first": weight, "second": 1 - weight},
    }

    def captions(first: int, count: int, world: int, threads: int) -> list[str]:
        parts = []
        for rank in range(world):
            stream = PairStream(manifest, **settings, rank=rank, world_size=world, start=first * size, workers=threads)
            ready = iter(stream)
            parts.append([next(ready).samples["text"] for _ in range(count)])
            stream.close()
        return [text for batch in range(count) for part in parts for text in part[batch]]

    whole = captions(0, batches, 1, 2)
    assert captions(0, stop, ranks, workers) + captions(stop, batches - stop, later_ranks, later_workers) == whole


def test_batches_mix_far_more_shards_than_a_rank_reads() -> None:
    """At full scale: 2,000 shards of 10,000 samples in 64 lanes; each of 8 ranks takes 8 lanes."""
    order = order_of([[10_000] * 2_000], None, seed=0)
    shards: list[set[int]] = [set() for _ in range(8)]
    for number in range(20):
        _, places = order.batch(5_000 + number, 2048)
        assert len(np.unique(places.shard)) > 100
        for rank in range(8):
            shards[rank] |= set(places.shard[rank * 256 : (rank + 1) * 256].tolist())
    # 8 lanes whose blocks span four or five shards; one more lane if a batch does not begin with a first lane.
    assert max(map(len, shards)) <= 9 * 6
    assert len(set.union(*shards)) > 200


def test_lanes_reach_their_next_shards_at_different_times() -> None:
    """8 lanes of 8 shards each, and blocks as long as a shard."""
    places = order_of([[100] * 64], None, seed=0, lanes=8, block=100).locate(np.arange(6400))
    _, firsts = np.unique(places.shard, return_index=True)
    steps = firsts[firsts >= 8] // 8
    assert np.bincount(steps).max() <= 3


def test_sets_of_one_block_are_shuffled_whole() -> None:
    order = order_of([[100] * 10], None, seed=3)
    shards = order.locate(np.arange(1000)).shard
    same = (shards[1:] == shards[:-1]).mean()
    assert abs(same - 0.1) < 0.04
    assert abs(np.corrcoef(shards[1:], shards[:-1])[0, 1]) < 0.1


def test_seeds_and_epochs_order_differently() -> None:
    orders = [order_of([[30, 20, 50]], None, seed=seed).locate(np.arange(200)).sample.tolist() for seed in (1, 2)]
    assert orders[0][:100] != orders[1][:100]
    assert orders[0][:100] != orders[0][100:]


@pytest.mark.parametrize("weights", [[0.0, 1.0], [-1.0, 1.0], [1e-6, 1.0], [float("nan"), 1.0]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="each must be above 0"):
        pattern(weights)


@pytest.mark.parametrize("settings", [{"lanes": 0}, {"block": 0}])
def test_impossible_shuffles_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="both must be at least 1"):
        order_of([[3]], None, seed=0, **settings)


def test_crops_are_uniform_and_functions_of_seed_and_position() -> None:
    found = uniform(5, np.arange(20_000), 2)
    assert np.array_equal(uniform(5, np.arange(10_000, 20_000), 2), found[10_000:])
    assert not np.array_equal(uniform(6, np.arange(20_000), 2), found)
    assert found.min() >= 0
    assert found.max() < 1
    assert np.abs(np.histogram(found, 10, (0, 1))[0] / found.size - 0.1).max() < 0.005
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.02


def test_the_order_never_changes() -> None:
    """Written down: a run that an earlier version began goes on with the samples that it has not seen."""
    pools, weights = [[40, 0, 25, 60], [33, 7]], [3.0, 1.0]
    found = {}
    for name, order in {
        "plain": order_of(pools[:1], None, seed=7, lanes=4, block=20),
        "one lane": order_of(pools[:1], None, seed=7, block=100),
        "weighted": order_of(pools, weights, seed=7, lanes=3, block=10),
        "one of two": order_of(pools, [0.0, 1.0], seed=7, lanes=3, block=10),
    }.items():
        positions, places = order.batch(3, 100)
        rows = np.stack([positions, places.shard, places.sample, places.lane])
        found[name] = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:12]
    assert found == {
        "plain": "6459f16f9cf6",
        "one lane": "ba1d5d5cee70",
        "weighted": "519feada3912",
        "one of two": "47d51da8a624",
    }
    # Crops and mirrored images.
    assert (uniform(5, np.array([0, 1, 10**9]), 2) * 2**53).astype(np.int64).tolist() == [
        [1762682463212224, 1346582728308958],
        [8253481036744020, 7187530344190016],
        [2964066055738873, 2562521380845334],
    ]
