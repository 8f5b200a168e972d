"""Held-out pairs: the hash of a name decides, no stream trains on them, and together with the others they are all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pairs import write_pairs
from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.data.order import Split, is_held_out, pair_name
from vdtrain.data.shards import StreamError
from vdtrain.data.stream import PairStream
from vdtrain.data.webdataset_stream import WebDatasetStream
from vdtrain.run.pulse import Pulse

SHARE, PAIRS = 0.3, 60
ARGUMENTS: dict[str, Any] = {"seed": 0, "resolution": 32, "workers": 1}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("held"), shards=3, count=PAIRS // 3)


def names(stream: PairStream, count: int) -> list[str]:
    """The names of a stream's first pairs."""
    places = stream.order.locate(np.arange(count))
    found = []
    for shard, sample in zip(places.shard.tolist(), places.sample.tolist(), strict=True):
        rows, taking_part = stream._samples(shard)
        found.append(pair_name(stream.manifest.paths[shard], rows.keys[taking_part[sample]].as_py()))
    stream.close()
    return found


def test_the_hash_of_a_name_decides_and_never_changes() -> None:
    held = [number for number in range(10_000) if is_held_out(f"00000.tar/{number:09d}", 0.01)]
    assert 70 < len(held) < 130
    # Written down: a run of any version, on any machine, holds out the same pairs.
    assert held[:3] == [81, 152, 204]
    assert all(is_held_out(f"00000.tar/{number:09d}", 0.02) for number in held)
    assert not any(is_held_out(str(number), 0.0) for number in range(1000))
    assert all(is_held_out(str(number), 1.0) for number in range(1000))


@pytest.mark.parametrize(
    "place",
    [
        *("00007.tar", "/data/laion/00007.tar", "../shards/00007.tar", "https://a.org/x.tar/00007.tar?key=1#part"),
        *("s3://bucket/00007.tar", "pipe:aws s3 cp s3://bucket/00007.tar -"),
        "pipe:tar -xOf whole.tar 00007.tar",
    ],
)
def test_a_pair_keeps_its_name_when_its_shard_moves(place: str) -> None:
    assert pair_name(place, "000070001") == "00007.tar/000070001"


def test_an_epoch_has_every_other_pair_once_and_no_held_out_one(manifest: Path) -> None:
    everything = names(PairStream(manifest, global_batch_size=4, **ARGUMENTS), PAIRS)
    expected = {name for name in everything if is_held_out(name, SHARE)}
    assert 5 < len(expected) < 35
    sides = {}
    for held_out in (False, True):
        stream = PairStream(manifest, global_batch_size=4, split=Split(SHARE, held_out), **ARGUMENTS)
        sides[held_out] = names(stream, len(stream))
    assert Counter(sides[True]) == Counter(expected)
    assert Counter(sides[False]) == Counter(set(everything) - expected)


def test_without_a_share_the_order_is_as_ever(manifest: Path) -> None:
    plain, split = (PairStream(manifest, global_batch_size=4, split=each, **ARGUMENTS) for each in (None, Split()))
    assert names(plain, 2 * PAIRS) == names(split, 2 * PAIRS)


def captions(batches: Any, count: int) -> Counter[str]:
    found: Counter[str] = Counter()
    while found.total() < count:
        found.update(next(batches).samples["text"])
    return found


def test_a_stream_without_an_index_holds_the_same_pairs_out(manifest: Path) -> None:
    content = Manifest(manifest)
    by_side: dict[bool, set[str]] = {False: set(), True: set()}
    for shard, path in enumerate(content.paths):
        rows = content.rows(shard)
        for key, caption in zip(rows.keys.to_pylist(), rows.captions.to_pylist(), strict=True):
            by_side[is_held_out(pair_name(path, key), SHARE)].add(caption)
    for held_out, expected in by_side.items():
        stream = WebDatasetStream(urls=content.shards, global_batch_size=2, split=Split(SHARE, held_out), **ARGUMENTS)
        assert set(captions(iter(stream), 2 * PAIRS)) <= expected
        stream.close()


def test_reading_the_names_of_all_pairs_is_a_sign_of_work(manifest: Path) -> None:
    """Without one, the watchdog would end a run whose billion names come from a slow disk."""
    pulse = Pulse(1.0, 1.0)
    pulse.beats(reads=False)
    assert not pulse.beats(reads=False)
    Split(SHARE).counts(Manifest(manifest), 32)
    assert pulse.beats(reads=False)


def test_a_share_without_pairs_is_an_error(manifest: Path) -> None:
    for held_out, share, text in (
        (True, 1e-9, "data.validation.share=1e-09: none of the 60 pairs of data.manifest=.* is held out; raise it"),
        (False, 0.99999999, "data.validation.share=0.99999999: each of the 60 pairs of .* is held out; lower it"),
    ):
        with pytest.raises(ManifestError, match=text):
            PairStream(manifest, global_batch_size=2, split=Split(share, held_out), **ARGUMENTS)
    stream = WebDatasetStream(urls=Manifest(manifest).shards, global_batch_size=2, split=Split(1e-9, True), **ARGUMENTS)
    with pytest.raises(StreamError, match=r"data.validation.share=1e-09: none of the pairs read is held out; raise it"):
        next(iter(stream))
    stream.close()
