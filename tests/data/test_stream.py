"""The stream: order, ranks, resume, images, and bad samples."""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from data_pipeline.index.index import index
from tests.pairs import overwrite, write_pairs, write_shard
from vdtrain.data.batch import Batch
from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.data.stream import PairStream, StreamError

BATCH = 12


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("stream"), shards=3, count=23)


def read(manifest: Path, batches: int, **settings: object) -> list[Batch]:
    stream = PairStream(manifest, **{"seed": 3, "resolution": 32, "global_batch_size": BATCH, **settings})
    try:
        return list(islice(stream, batches))
    finally:
        stream.close()


def same(first: Batch, second: Batch) -> bool:
    return (
        torch.equal(first.samples["image"], second.samples["image"])
        and first.samples["text"] == second.samples["text"]
        and torch.equal(first.positions, second.positions)
    )


def test_an_epoch_holds_every_sample_once(manifest: Path) -> None:
    stream = PairStream(manifest, seed=3, resolution=32, global_batch_size=BATCH)
    assert len(stream) == 69
    places = [stream.order.locate(np.arange(epoch * 69, (epoch + 1) * 69)) for epoch in range(3)]
    stream.close()
    epochs = [list(zip(each.shard.tolist(), each.sample.tolist(), strict=True)) for each in places]
    for samples in epochs:
        assert sorted(samples) == [(shard, sample) for shard in range(3) for sample in range(23)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def test_seeds_order_differently(manifest: Path) -> None:
    first, second = read(manifest, 1)[0], read(manifest, 1, seed=4)[0]
    assert first.samples["text"] != second.samples["text"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_together_read_the_global_batch(manifest: Path, ranks: int) -> None:
    whole = read(manifest, 7)
    parts = [read(manifest, 7, rank=rank, world_size=ranks) for rank in range(ranks)]
    for number, batch in enumerate(whole):
        pieces = [part[number] for part in parts]
        assert torch.equal(torch.cat([piece.samples["image"] for piece in pieces]), batch.samples["image"])
        assert [caption for piece in pieces for caption in piece.samples["text"]] == batch.samples["text"]
        assert torch.equal(torch.cat([piece.positions for piece in pieces]), batch.positions)


def test_any_number_of_workers_reads_the_same(manifest: Path) -> None:
    for one, many in zip(
        read(manifest, 7, workers=1, prefetch=1), read(manifest, 7, workers=4, prefetch=5), strict=True
    ):
        assert same(one, many)


@pytest.mark.parametrize("done", [1, 5, 6, 11])
def test_resuming_anywhere_goes_on_as_if_never_stopped(manifest: Path, done: int) -> None:
    """Positions beyond 69 lie in the second epoch."""
    whole = read(manifest, 13)
    resumed = read(manifest, 13 - done, start=done * BATCH)
    for expected, found in zip(whole[done:], resumed, strict=True):
        assert same(expected, found)


def test_pairs_stay_together(manifest: Path) -> None:
    """Each caption comes with its image in the shard, which another library reads for comparison."""
    own = {}
    for shard in Manifest(manifest).shards:
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False).decode("rgb8"):
            own.setdefault(sample["txt"], []).append(sample["jpg"])
    for batch in read(manifest, 3, resolution=64):
        for image, caption in zip(batch.samples["image"], batch.samples["text"], strict=True):
            differences = [np.abs(image.permute(1, 2, 0).numpy().astype(int) - other).mean() for other in own[caption]]
            assert min(differences) < 1


@pytest.mark.parametrize("resolution", [32, 64])
def test_images_have_the_phases_resolution(manifest: Path, resolution: int) -> None:
    (batch,) = read(manifest, 1, resolution=resolution)
    assert batch.samples["image"].shape == (BATCH, 3, resolution, resolution)
    assert batch.samples["image"].dtype == torch.uint8


def test_small_images_are_left_out_by_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "000000.tar", 10, seed=0, pixels=48)
    write_shard(tmp_path / "shards" / "000001.tar", 10, seed=1, pixels=64)
    index({"drawn": tmp_path / "shards"}, tmp_path / "manifest")
    for resolution, expected in ((32, 20), (64, 10)):
        stream = PairStream(tmp_path / "manifest", seed=0, resolution=resolution, global_batch_size=2)
        assert len(stream) == expected
        stream.close()
    with pytest.raises(ManifestError, match="none of 20 images has a side of 128"):
        PairStream(tmp_path / "manifest", seed=0, resolution=128, global_batch_size=2)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lanes": 0}, r"data\.stream: lanes=0, block=32768: both must be at least 1"),
        ({"bad_share": 2.0}, r"data\.stream\.bad_share=2\.0: must be from 0 to 1"),
        ({"weights": {"else": 1.0}}, r"data\.stream\.weights=\{'else': 1\.0\}: .* has the sources drawn; give weights"),
        ({"weights": [1.0]}, r"data\.stream\.weights=\[1\.0\]: .* has the sources drawn; give weights"),
        *(
            (
                {"weights": {"drawn": weight}},
                rf"data\.stream\.weights=\{{'drawn': {weight!r}\}}: give numbers of at least 0",
            )
            for weight in (-1.0, 0, float("nan"), float("inf"), "3", None, True)
        ),
        ({"weights": {}}, r"data\.stream\.weights=\{\}: give numbers of at least 0, one of them above 0"),
        ({"timeout": 0}, r"data\.stream\.timeout=0: give the seconds of one read, above 0"),
        ({"timeout": "5 s"}, r"data\.stream\.timeout=5 s: give the seconds of one read, above 0"),
        ({"cache": {"folder": "x"}}, r"data\.stream\.cache=\{'folder': 'x'\}: give \{folder: \.\.\., gigabytes"),
        (
            {"cache": {"folder": "/dev/null/x", "gigabytes": 1}},
            r"data\.stream\.cache\.folder=.*: cannot be written",
        ),
    ],
)
def test_impossible_settings_are_named(manifest: Path, settings: dict[str, object], line: str) -> None:
    with pytest.raises(ManifestError, match=line):
        read(manifest, 1, **settings)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, "first" of images of 64 pixels and "second" of 48, whose shards are not there."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, pixels in (("first", 64), ("second", 48)):
        (folder / name).mkdir()
        write_shard(folder / name / "000000.tar", 20, seed=pixels, pixels=pixels)
    index({"first": folder / "first", "second": folder / "second"}, folder / "manifest")
    (folder / "second" / "000000.tar").unlink()
    return folder / "manifest"


@pytest.mark.parametrize("weights", [{"first": 2, "second": 0}, {"first": 0.5}, {"first": 1, "second": 0.0}])
def test_a_source_of_weight_0_is_left_out(mixture: Path, weights: dict[str, float]) -> None:
    """Its shards are not read, and need not be there, nor have images that are large enough."""
    for settings in ({}, {"resolution": 64}):
        batches = read(mixture, 5, weights=weights, **settings)
        assert len({tuple(batch.positions.tolist()) for batch in batches}) == 5
    stream = PairStream(mixture, seed=3, resolution=32, global_batch_size=20, weights=weights)
    places = stream.order.locate(np.arange(40))
    assert len(stream) == 20
    stream.close()
    sources = stream.manifest.sources[places.shard]
    assert {stream.manifest.source_names[number] for number in sources.tolist()} == {"first"}
    assert sorted(places.sample[:20].tolist()) == sorted(places.sample[20:].tolist()) == list(range(20))
    with pytest.raises(StreamError, match=r"second/000000\.tar: is not there"):
        read(mixture, 1, weights={"second": 1})
    with pytest.raises(ManifestError, match=r"no image of second has a side of 64 .* or set its weight to 0"):
        read(mixture, 1, weights={"first": 1, "second": 1}, resolution=64)


def test_a_source_keeps_its_order_when_another_is_left_out(mixture: Path) -> None:
    """So that a run that resumes with other weights goes on with the order of each source."""

    def order_of_second(weights: dict[str, float]) -> list[int]:
        stream = PairStream(mixture, seed=3, resolution=32, global_batch_size=20, weights=weights)
        places = stream.order.locate(np.arange(40))
        stream.close()
        second = stream.manifest.sources[places.shard] == stream.manifest.source_names.index("second")
        return list(places.sample[second][:20].tolist())

    assert order_of_second({"second": 1}) == order_of_second({"second": 1, "first": 1})


def test_other_shards_give_a_stream_another_identity(tmp_path: Path) -> None:
    def identity() -> str:
        stream = PairStream(tmp_path / "manifest", seed=0, resolution=32, global_batch_size=2)
        stream.close()
        return stream.identity

    manifest = write_pairs(tmp_path, shards=1, count=5)
    before = identity()
    assert identity() == before
    write_shard(tmp_path / "shards" / "000001.tar", 5, seed=9)
    index({"drawn": tmp_path / "shards"}, manifest)
    assert identity() != before


def damage(manifest: Path, rows: list[int]) -> None:
    """Overwrite images, numbered through all shards."""
    content = Manifest(manifest)
    for row in rows:
        shard = int(np.searchsorted(np.cumsum(content.samples), row, side="right"))
        inside = row - int(content.samples[:shard].sum())
        places = content.rows(shard)
        overwrite(Path(content.shards[shard]), int(places.offset[inside]), int(places.size[inside]))


def test_a_bad_sample_is_replaced_in_the_same_way_everywhere(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path, shards=2, count=20)
    damage(manifest, [7])
    whole = read(manifest, 4, global_batch_size=10)
    halves = [read(manifest, 4, global_batch_size=10, rank=rank, world_size=2) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([half[number].samples["image"] for half in halves]), batch.samples["image"])
    stream = PairStream(manifest, seed=3, resolution=32, global_batch_size=40)
    next(iter(stream))
    assert sum(stream.replaced.values()) >= 1
    stream.close()


def test_the_first_sample_of_a_shard_replaces_its_bad_last_one(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path, shards=1, count=20)
    damage(manifest, [19])
    (batch,) = read(manifest, 1, global_batch_size=20)
    assert sorted(batch.names) == sorted(
        [*(f"../shards/000000/{row:06d}" for row in range(19)), "../shards/000000/000000"]
    )


def test_a_share_of_bad_samples_may_come_for_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = write_pairs(tmp_path, shards=1, count=40)
    damage(manifest, [3, 17])
    stream = PairStream(manifest, seed=3, resolution=32, global_batch_size=40, bad_share=0.06)
    for _ in islice(stream, 12):
        pass
    stream.close()
    assert sum(stream.replaced.values()) == 24
    assert caplog.text.count("bad sample, replaced") == 10


def test_a_rank_counts_its_own_samples(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path, shards=1, count=40)
    damage(manifest, list(range(0, 40, 4)))
    stream = PairStream(manifest, seed=3, resolution=32, global_batch_size=40, rank=1, world_size=2)
    batches = Counter[int]()
    with pytest.raises(StreamError) as failure:
        batches.update(len(batch) for batch in stream)
    stream.close()
    assert f"{sum(stream.replaced.values())} of {20 * (batches[20] + 1)} samples were bad" in str(failure.value)


def test_rows_of_few_shards_stay_in_memory(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdtrain.data.stream.KEPT_ROWS", 50)
    stream = PairStream(manifest, seed=3, resolution=32, global_batch_size=BATCH, workers=1)
    for _ in islice(stream, 6):
        assert stream._kept_rows == 23 * len(stream._rows) <= 50
    stream.close()
    assert len(stream._rows) == 2


def test_too_many_bad_samples_stop_the_stream(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path, shards=2, count=40)
    damage(manifest, list(range(0, 80, 2)))
    with pytest.raises(StreamError, match="samples were bad"):
        read(manifest, 10, global_batch_size=40)


def test_bad_samples_are_counted_by_few_reasons_and_told_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write_pairs(tmp_path, shards=1, count=40)
    content = Manifest(manifest)
    rows, keys = content.rows(0), content.columns(0, ["key"])["key"].to_pylist()
    kinds = {3: b"GIF89a", 17: b"GIF87a", 20: b"\xff\xd8\xff\xe0"}
    shard = Path(content.shards[0])
    status = shard.stat()
    with shard.open("r+b") as file:
        for row, head in kinds.items():
            file.seek(int(rows.offset[row]))
            file.write(head.ljust(int(rows.size[row]), b"\0"))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    stream = PairStream(manifest, seed=3, resolution=32, global_batch_size=40, bad_share=0.5)
    next(iter(stream))
    stream.close()
    assert stream.replaced == {"GIF is not read": 2, "truncated": 1}
    for row, reason in ((3, "GIF is not read"), (17, "GIF is not read"), (20, "truncated: no frame")):
        assert f"{content.shards[0]}, key {keys[row]} ({reason})" in caplog.text
    for bad, start in ((range(0, 40, 2), "samples were bad"), (range(40), "10 samples in a row")):
        damage(manifest, list(bad))
        last = r"the last were (\S+000000\.tar, key \S+ \([^()]+\)(, |$)){3}$"
        with pytest.raises(StreamError, match=rf"{start} .*{last}"):
            read(manifest, 10, global_batch_size=40)


def test_a_shard_that_has_gone_is_named(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path, shards=1, count=20)
    Path(Manifest(manifest).shards[0]).unlink()
    with pytest.raises(StreamError, match=r"000000\.tar: is not there; bring it back, or index the shards again"):
        read(manifest, 1)
