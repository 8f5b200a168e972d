"""Sets of different modalities, mixed: the index lists files of any ending, and samples may lack a modality."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.index.index import index
from vdtrain.data.batch import Batch, Mirror
from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.data.order import Split
from vdtrain.data.stream import PairStream, StreamError
from vdtrain.errors import ConfigError

MEMBERS = {"audio": ["wav", ".FLAC"], "depth": ["depth.png"]}


class Numbers:
    """Reads a file of bytes as float32 [n]; a modality's reader."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, data: bytes) -> torch.Tensor:
        if data == b"bad":
            raise RuntimeError("not a sound")
        return torch.tensor(list(data), dtype=torch.float32) * self.scale


READERS = {"audio": {"_target_": "tests.data.test_mixed.Numbers", "scale": 0.5}}


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images with captions, 12 sounds with captions, and 6 of all three; sound number n is the bytes n, n + 1."""
    folder = tmp_path_factory.mktemp("mixed")
    sounds = {number: bytes([number, number + 1]) for number in range(30)}
    write_tar(
        folder / "shards" / "images.tar",
        {f"i{n}": {"png": picture(n), "txt": f"image {n}".encode()} for n in range(12)},
    )
    write_tar(
        folder / "shards" / "sounds.tar",
        {f"s{n}": {"WAV": sounds[n], "txt": f"sound {n}".encode()} for n in range(12, 24)},
    )
    write_tar(
        folder / "shards" / "both.tar",
        {f"b{n}": {"png": picture(n), "flac": sounds[n], "txt": f"both {n}".encode()} for n in range(24, 30)},
    )
    index({}, folder / "manifest", own=[folder / "shards"], members=MEMBERS)
    return folder / "manifest"


def stream(manifest: Path, size: int = 10, **settings: Any) -> PairStream:
    given = {"seed": 3, "resolution": 16, "global_batch_size": size, "members": READERS, **settings}
    return PairStream(manifest, **given)


def first(stream: PairStream, count: int = 1) -> list[Batch]:
    try:
        return list(islice(stream, count))
    finally:
        stream.close()


def told(batch: Batch) -> list[tuple[int, str, float | None, float | None]]:
    """Of each sample in the order of the positions: its position, caption, shade and first number of the sound."""
    rows = {name: each.tolist() for name, each in batch.rows.items()}
    images = dict(zip(rows["image"], batch.samples["image"][:, 0, 0, 0].tolist(), strict=True))
    sounds = dict(zip(rows["audio"], [each[0].item() for each in batch.samples["audio"]], strict=True))
    captions = dict(zip(rows["text"], batch.samples["text"], strict=True))
    return sorted(
        (position, captions[row], images.get(row), sounds.get(row))
        for row, position in enumerate(batch.positions.tolist())
    )


def test_every_sample_comes_once_with_what_it_has(manifest: Path) -> None:
    (batch,) = first(stream(manifest, 30))
    assert batch.rows.keys() == {"image", "text", "audio"}
    assert [len(batch.rows[name]) for name in ("image", "text", "audio")] == [18, 30, 18]
    found = {caption: (shade, sound) for _, caption, shade, sound in told(batch)}
    assert found == (
        {f"image {n}": (n, None) for n in range(12)}
        | {f"sound {n}": (None, n / 2) for n in range(12, 24)}
        | {f"both {n}": (n, n / 2) for n in range(24, 30)}
    )


def test_without_members_no_limit_lets_samples_without_an_image_in(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards" / "0.tar", {"a": {"wav": b"a", "txt": b"a"}, "b": {"png": picture(1), "txt": b"b"}})
    index({}, tmp_path / "manifest", own=[tmp_path / "shards"], members=MEMBERS)
    (batch,) = first(stream(tmp_path / "manifest", 2, members=None, min_side=0))
    assert batch.samples["text"] == ["b", "b"]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_share_a_global_batch_and_a_later_start_goes_on(manifest: Path, ranks: int) -> None:
    whole = [told(batch) for batch in first(stream(manifest), 7)]
    for number in (0, 4):
        parts = [first(stream(manifest, rank=rank, world_size=ranks, start=10 * number))[0] for rank in range(ranks)]
        assert sorted(each for part in parts for each in told(part)) == whole[number]
        assert {tuple(part.rows) for part in parts} == {("image", "text", "audio")}


def test_weights_mix_sources(manifest: Path, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("pictures", "noises")}
    for name, ending in (("pictures", "images"), ("noises", "sounds")):
        write_tar(folders[name] / "0.tar", {})
        (folders[name] / "0.tar").write_bytes((manifest.parent / "shards" / f"{ending}.tar").read_bytes())
        (folders[name] / "0_stats.json").write_text('{"status_dict": {"success": 12}}')
    index(folders, tmp_path / "manifest", members=MEMBERS)
    batches = first(stream(tmp_path / "manifest", 8, weights={"pictures": 3, "noises": 1}), 6)
    assert [len(batch.rows["audio"]) for batch in batches] == [2] * 6


def test_without_readers_or_with_what_is_needed_the_others_are_left_out(manifest: Path) -> None:
    plain = stream(manifest, members=None)
    assert len(plain) == 18
    (batch,) = first(plain)
    assert batch.rows == {}
    assert batch.samples.keys() == {"image", "text"}
    for need, count in ((["audio"], 18), (["image", "audio"], 6), (["text"], 30)):
        needing = stream(manifest, 6, need=need)
        assert len(needing) == count
        (batch,) = first(needing)
        assert all(len(batch.rows[name]) == 6 for name in need)


def test_held_out_samples_are_no_others(manifest: Path) -> None:
    sides = [stream(manifest, 5, split=Split(0.3, held_out)) for held_out in (False, True)]
    assert sum(map(len, sides)) == 30
    captions = [{each[1] for batch in first(side, 40 // 5) for each in told(batch)} for side in sides]
    assert not captions[0] & captions[1]


def test_an_image_without_a_caption_has_no_cached_latent(tmp_path: Path) -> None:
    samples = {f"b{n}": {"png": picture(n), "wav": b"12", **({"txt": b"told"} if n % 2 else {})} for n in range(8)}
    write_tar(tmp_path / "shards" / "both.tar", samples)
    manifest, folder = tmp_path / "manifest", tmp_path / "latents"
    index({}, manifest, own=[tmp_path / "shards"], members=MEMBERS)
    settings = ["model=tiny", "data=shapes", "hardware=cpu", "data.latent_cache.resolutions=[32]"]
    assert main(["latents", *settings, f"data.manifest={manifest}", f"data.latent_cache.folder={folder}"]) == 0

    def first(need: list[str]) -> Batch:
        stream = PairStream(
            manifest, seed=0, resolution=32, global_batch_size=4, latents=str(folder), members=READERS, need=need
        )
        try:
            return next(iter(stream))
        finally:
            stream.close()

    assert first(["text"]).moments["image"].shape == (4, 8, 4, 4)
    with pytest.raises(StreamError, match=r"latents=cached: .*/b\d is an image without a caption.*need=\[text\]"):
        first([])


def test_a_bad_file_is_replaced_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = {f"s{n}": {"wav": b"bad" if n == 3 else bytes([n]), "txt": b"x"} for n in range(8)}
    write_tar(tmp_path / "shards" / "0.tar", samples)
    index({}, tmp_path / "manifest", own=[tmp_path / "shards"], members=MEMBERS)
    (batch,) = first(stream(tmp_path / "manifest", 8))
    assert batch.replaced == {"cannot read audio": 1}
    assert "key s3 (cannot read audio: not a sound)" in caplog.text


def test_a_replaced_sample_leaves_nothing_of_itself(tmp_path: Path) -> None:
    """Neither that it has an image, or none, nor the file that was read before the bad one."""
    readers = {**READERS, "depth": {"_target_": "tests.data.test_mixed.Numbers"}}
    heard = {"wav": b"ab", "depth.png": b"bad", "txt": b"heard"}
    for name, samples in {
        "with": {"a": {**heard, "png": picture(1)}, "b": {"wav": b"cd", "txt": b"whole"}},
        "without": {"a": heard, "b": {"png": picture(2), "txt": b"whole"}},
    }.items():
        write_tar(tmp_path / name / "shards" / "0.tar", samples)
        index({}, tmp_path / name / "manifest", own=[tmp_path / name / "shards"], members=MEMBERS)
        (batch,) = first(stream(tmp_path / name / "manifest", 2, members=readers))
        assert (batch.samples["text"], batch.replaced) == (["whole"] * 2, {"cannot read depth": 1})
        both = list(range(2))
        rows = {"with": ([], both), "without": (both, [])}[name]
        assert (batch.rows["image"].tolist(), batch.rows["audio"].tolist()) == rows
        assert len(set(batch.names)) == 1


def test_samples_of_different_shapes_are_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards" / "0.tar", {f"s{n}": {"wav": bytes(n), "txt": b"x"} for n in range(1, 5)})
    index({}, tmp_path / "manifest", own=[tmp_path / "shards"], members=MEMBERS)
    with pytest.raises(StreamError, match=r"data\.stream\.members\.audio: its samples have different shapes"):
        first(stream(tmp_path / "manifest", 4))


def test_which_files_make_a_sample(tmp_path: Path) -> None:
    drawn, sound = picture(1), b"sound"
    write_tar(
        tmp_path / "shards" / "0.tar",
        {
            "image and sound": {"png": drawn, "wav": sound},
            "sound alone": {"wav": sound},
            "named": {"vocals.wav": sound, "txt": b"a song"},
            "compound": {"png": drawn, "depth.png": drawn, "txt": b"near"},
            "dated.2020": {"wav": sound, "txt": b"old"},
            "two": {"flac": b"second", "wav": sound, "txt": b"first of both"},
            "told by JSON": {"wav": sound, "json": b'{"caption": "told"}'},
        },
    )
    index({}, tmp_path / "manifest", own=[tmp_path / "shards"], members=MEMBERS)
    content = Manifest(tmp_path / "manifest")
    rows = content.rows(0)
    found = {
        key: (caption, pictured, [name for name, (_, size) in rows.members.items() if size[row] >= 0])
        for row, (key, caption, pictured) in enumerate(
            zip(rows.keys.to_pylist(), rows.captions.to_pylist(), rows.pictured.tolist(), strict=True)
        )
    }
    assert found == {
        "image and sound": ("", True, ["audio"]),
        "named": ("a song", False, ["audio"]),
        "compound": ("near", True, ["depth"]),
        "dated.2020": ("old", False, ["audio"]),
        "two": ("first of both", False, ["audio"]),
        "told by JSON": ("told", False, ["audio"]),
    }
    assert content.counts(0).tolist() == [1]
    assert content.partial().tolist() == [5]
    # Other endings read the shards again.
    index({}, tmp_path / "manifest", own=[tmp_path / "shards"])
    assert Manifest(tmp_path / "manifest").samples.tolist() == [1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"audio": ["jpg"]}, "data.index.members.audio: 'jpg' is no ending of another modality's files"),
        ({"audio": []}, "data.index.members.audio: empty"),
        ({"image": ["raw"]}, "data.index.members.image: images and captions are always indexed"),
        ({"a": ["wav"], "b": ["WAV"]}, "data.index.members.b: 'WAV' is an ending of a too"),
    ],
)
def test_endings_that_cannot_work_are_one_line(tmp_path: Path, members: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        index({}, tmp_path / "manifest", own=[tmp_path], members=members)
    assert str(error.value).startswith(message)


def batch() -> Batch:
    rows = {"image": torch.tensor([0, 2, 3]), "audio": torch.tensor([1, 3])}
    samples = {"image": torch.tensor([10, 12, 13]), "text": ["a", "b", "c", "d"], "audio": [21, 23]}
    return Batch(samples, torch.arange(4), names=["0", "1", "2", "3"], rows=rows)


def test_a_cut_keeps_what_its_samples_have() -> None:
    part = batch().cut(1, 3)
    assert part.samples["image"].tolist() == [12]
    assert (part.samples["text"], part.samples["audio"], part.names) == (["b", "c"], [21], ["1", "2"])
    assert {name: rows.tolist() for name, rows in part.rows.items()} == {"image": [1], "audio": [0]}


def test_another_order_keeps_what_its_samples_have() -> None:
    part = batch().take(torch.tensor([3, 1, 0]))
    assert part.samples["image"].tolist() == [13, 10]
    assert (part.samples["text"], part.samples["audio"], part.names) == (["d", "b", "a"], [23, 21], ["3", "1", "0"])
    assert {name: rows.tolist() for name, rows in part.rows.items()} == {"image": [0, 2], "audio": [0, 1]}


def test_images_are_mirrored_as_if_nothing_were_missing(manifest: Path) -> None:
    captions = ["left"] * 5 + ["x"] * 15
    images = torch.arange(20 * 2).view(20, 1, 1, 2)
    whole = Batch({"image": images.clone(), "text": captions}, torch.arange(20))
    rows = {"image": torch.arange(0, 20, 2), "text": torch.arange(20)}
    some = Batch({"image": images[::2].clone(), "text": captions}, torch.arange(20), rows=rows)
    mirrored = Mirror(0)(whole).samples["image"]
    assert torch.equal(Mirror(0)(some).samples["image"], mirrored[::2])
    assert not torch.equal(mirrored, images)
    assert np.array_equal(mirrored[:5], images[:5])


def test_a_modality_that_was_not_indexed_is_one_line(manifest: Path) -> None:
    readers = {"music": READERS["audio"]}
    with pytest.raises(
        ManifestError, match=r"data\.stream\.members\.music: .* has the further modalities audio, depth"
    ):
        stream(manifest, members=readers)
    with pytest.raises(ManifestError, match=r"data\.stream\.need=\[audio, depth\]: no sample of .* has all of them"):
        stream(manifest, need=["audio", "depth"])
