"""Cached latents are what the encoder would give, and nothing else is ever taken for them. Under 20 seconds."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.__main__ import main
from data_pipeline.index.index import index
from tests.data.test_mixed import MEMBERS, READERS, write_tar
from tests.pairs import overwrite, write_pairs
from vdtrain.config.command_schema import LatentsConfig
from vdtrain.config.compose import compose, to_object
from vdtrain.config.instantiate import instantiate
from vdtrain.data import latents as latents_module
from vdtrain.data.batch import Batch
from vdtrain.data.decode import DecodeError
from vdtrain.data.latents import (
    DESCRIPTION_FILE,
    LatentDescription,
    LatentFolder,
    LatentShards,
    file_name,
    out_of_range,
    write_latents,
)
from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.data.shards import StreamError
from vdtrain.data.stream import PairStream
from vdtrain.models.frozen_weights import fingerprint
from vdtrain.models.image_vae import ImageVAE

RESOLUTION, BATCH = 32, 12
# Half the distance between neighbouring float16 numbers, relative to them, and among the smallest of them.
RELATIVE, ABSOLUTE = 2.0**-11, 2.0**-25


def specification() -> dict[str, Any]:
    config = to_object(compose("latents", ["model=tiny", "data=shapes", "hardware=cpu"]), LatentsConfig)
    return config.model.modalities["image"].vae


def vae(dtype: torch.dtype) -> ImageVAE:
    built: ImageVAE = instantiate(specification(), "vae")
    return built.to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("latents"), shards=3, count=23)


def make(manifest: Path, folder: Path, precision: str = "fp32") -> Path:
    settings = ["model=tiny", "data=shapes", "hardware=cpu", f"hardware.precision={precision}"]
    settings += [f"data.manifest={manifest}", f"data.latent_cache.folder={folder}"]
    assert main(["latents", *settings, f"data.latent_cache.resolutions=[{RESOLUTION}]"]) == 0
    return folder


@pytest.fixture(scope="module")
def cache(manifest: Path) -> Path:
    return make(manifest, manifest.with_name("latents"))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_cached_latents_are_the_encoders(manifest: Path, tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    """Within the rounding of the moments to float16, which bfloat16's own are not subject to."""
    folder = make(manifest, tmp_path / "latents", precision)
    stream = PairStream(
        manifest, seed=3, resolution=RESOLUTION, global_batch_size=BATCH, random_crop=False, latents=str(folder)
    )
    encoder, compared = vae(dtype), 0
    for batch in islice(stream, 6):
        cached = batch.moments["image"]
        exact = encoder.moments(batch.samples["image"].contiguous())
        noise = torch.randn(BATCH, 4, 4, 4, generator=torch.Generator().manual_seed(compared))
        for draw in (None, noise):
            difference = encoder.from_moments(cached, draw).double() - encoder.from_moments(exact, draw).double()
            # The cache's batches are others, which may change the last bit of what the encoder computes.
            last_bit = 2.0**-22 if dtype == torch.float32 else 2.0**-8
            bound = latent_bound(exact.double(), draw, encoder.latent_scale, RELATIVE + last_bit)
            assert (difference.abs() <= bound + 8 * last_bit * (dtype == torch.float32)).all()
        if dtype == torch.bfloat16:
            assert (cached.bfloat16() == exact).double().mean() > 0.99
        compared += len(cached)
    stream.close()
    assert compared == 6 * BATCH


def latent_bound(moments: Tensor, noise: Tensor | None, scale: float, relative: float) -> Tensor:
    """By how much a latent can differ where its moments were rounded to such a part of themselves."""
    mean, logvar = moments.chunk(2, dim=1)
    rounding = scale * (relative * mean.abs() + ABSOLUTE)
    if noise is not None:
        exponent = 0.5 * (relative * logvar.abs() + ABSOLUTE)
        rounding = rounding + scale * (0.5 * logvar).exp() * torch.expm1(exponent) * noise.abs()
    return rounding


def test_float16_keeps_bfloat16_moments_to_the_last_bit() -> None:
    moments = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).mul(10).bfloat16()
    usual = moments[moments.abs() >= 2.0**-14]
    assert len(usual) > 9_900
    assert torch.equal(usual.half().bfloat16(), usual)
    for extreme in (-30.0, 20.0, 30.0, -30.0 * 2):
        assert torch.tensor(extreme).half().item() == extreme


def test_files_are_plain_safetensors(manifest: Path, cache: Path) -> None:
    found = Manifest(manifest)
    path = LatentFolder(cache, RESOLUTION).path_of(found, 1)
    tensors = load_file(path)
    assert {name: (value.dtype, list(value.shape)) for name, value in tensors.items()} == {
        "moments": (torch.float16, [23, 8, 4, 4]),
        "rows": (torch.int32, [23]),
        "offsets": (torch.int64, [23]),
        "bad": (torch.uint8, [23]),
        "checks": (torch.int32, [23]),
    }
    shards = LatentShards(cache, found, RESOLUTION)
    for row in (22, 0, 7):
        out = torch.empty(8, 4, 4)
        shards.read(1, row, out)
        assert torch.equal(out, tensors["moments"][row].float())


def test_many_threads_read_with_few_files_open(manifest: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents_module, "OPEN_FILES", 1)
    found = Manifest(manifest)
    shards = LatentShards(cache, found, RESOLUTION)
    files = [load_file(LatentFolder(cache, RESOLUTION).path_of(found, shard))["moments"] for shard in range(3)]

    def look(number: int) -> bool:
        out = torch.empty(shards.shape, dtype=torch.float16)
        shards.read(number % 3, number % 23, out)
        return torch.equal(out, files[number % 3][number % 23])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(600)))
    assert len(shards._files) == 1


def test_an_index_of_other_samples_keeps_the_latents_of_the_images(tmp_path: Path) -> None:
    """`data.index.decode=true` leaves out what cannot be decoded, so that the later rows have other numbers."""
    found = Manifest(write_pairs(tmp_path, shards=2, count=23))
    for shard in (0, 1):
        place, size = found.rows(shard).offset.item(5), found.rows(shard).size.item(5)
        overwrite(Path(found.shards[shard]), place + size // 2, size // 2)
    manifest, sources = tmp_path / "damaged", {"drawn": tmp_path / "shards"}
    index(sources, manifest)
    folder = make(manifest, tmp_path / "latents")
    file = LatentFolder(folder, RESOLUTION).path_of(Manifest(manifest), 1)
    index(sources, manifest, decode=True)
    assert [len(Manifest(manifest).rows(shard)) for shard in (0, 1)] == [22, 22]
    stream = PairStream(
        manifest, seed=3, resolution=RESOLUTION, global_batch_size=44, random_crop=False, latents=str(folder)
    )
    batch = next(iter(stream))
    stream.close()
    assert torch.allclose(
        batch.moments["image"].float(), vae(torch.float32).moments(batch.samples["image"].contiguous()), atol=0.01
    )
    # Files of earlier versions tell rows alone: they are refused where the shard has fewer.
    rewritten(file, lambda tensors: tensors.pop("offsets"))
    with pytest.raises(StreamError, match="not the latents of its shard"):
        LatentShards(folder, Manifest(manifest), RESOLUTION).read(1, 0, torch.empty(8, 4, 4))


@pytest.fixture
def written(manifest: Path, tmp_path: Path) -> tuple[Manifest, Path, list[Path]]:
    """A cache of the first shards' odd rows only, without an encoder; row 3 of each is bad."""
    found, files = Manifest(manifest), []
    description = LatentDescription(RESOLUTION, RESOLUTION, (2, 1, 1), "a0", "fp32")
    (tmp_path / "32").mkdir()
    (tmp_path / "32" / DESCRIPTION_FILE).write_text(json.dumps(description.to_dict()))
    for shard, (path, sha256) in enumerate(zip(found.paths, found.hashes, strict=True)):
        file = tmp_path / "32" / file_name(path, sha256)
        rows = np.arange(1, 23, 2, dtype=np.int32)
        moments = rows[:, None, None, None] * np.ones((11, 2, 1, 1), np.float16)
        offsets = found.rows(shard).offset[rows]
        write_latents(file, description, sha256, rows, offsets, rows == 3, moments.astype(np.float16))
        files.append(file)
    return found, tmp_path, files


def test_rows_are_found_by_number_and_bad_ones_are_told(written: tuple[Manifest, Path, list[Path]]) -> None:
    found, folder, _ = written
    shards = LatentShards(folder, found, RESOLUTION, vae="a0")
    out = torch.zeros(2, 1, 1, dtype=torch.float16)
    shards.read(2, 21, out)
    assert out.tolist() == [[[21]], [[21]]]
    assert bad_rows(shards, 0) == [3]
    for row in (4, 22):
        with pytest.raises(StreamError, match=f"has no latent of sample {row}; remove it"):
            shards.read(0, row, out)


def bad_rows(shards: LatentShards, shard: int) -> list[int]:
    """Those of the odd rows whose image could not be decoded."""
    reasons = {}
    for row in range(1, 23, 2):
        try:
            shards.read(shard, row, torch.empty(2, 1, 1))
        except DecodeError as error:
            reasons[row] = str(error)
    assert set(reasons.values()) <= {"no latent: its image could not be decoded"}
    return list(reasons)


def rewritten(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a file's tensors behind the back of their checksums."""
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file, metadata)


def test_a_flipped_bit_costs_its_sample(written: tuple[Manifest, Path, list[Path]]) -> None:
    found, folder, files = written
    data = bytearray(files[1].read_bytes())
    at = (
        8
        + int.from_bytes(data[:8], "little")
        + json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["moments"]["data_offsets"][0]
    )
    data[at + 4 * 4] ^= 1  # the first byte of the fifth sample, of four bytes each
    files[1].write_bytes(data)
    shards = LatentShards(folder, found, RESOLUTION)
    with pytest.raises(DecodeError, match=f"damaged latent: {files[1]} does not hold what was written; remove it"):
        shards.read(1, 9, torch.empty(2, 1, 1))
    rewritten(files[2], lambda tensors: tensors["bad"].zero_())
    assert bad_rows(shards, 2) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1001.0, -6e4])
def test_a_value_beyond_any_latents_costs_its_sample(written: tuple[Manifest, Path, list[Path]], value: float) -> None:
    """In a file by an earlier version, without checksums."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["checks"]
        tensors["moments"][4, 1] = value

    found, folder, files = written
    rewritten(files[1], change)
    shards = LatentShards(folder, found, RESOLUTION)
    with pytest.raises(DecodeError, match="latent out of range: beyond 1000 in "):
        shards.read(1, 9, torch.empty(2, 1, 1))
    shards.read(1, 11, torch.empty(2, 1, 1))
    assert out_of_range(np.array([[1000.0], [-1000.0], [value], [0.0]], np.float16)).tolist() == [
        *(False, False, True, False)
    ]


@pytest.mark.parametrize("size", [0, 5, 100, 400, -1, -20])
def test_a_truncated_file_is_not_read(written: tuple[Manifest, Path, list[Path]], size: int) -> None:
    found, folder, files = written
    shards = LatentShards(folder, found, RESOLUTION)
    data = files[1].read_bytes()
    files[1].write_bytes(data[:size] if size >= 0 else data[: len(data) + size])
    with pytest.raises(StreamError, match=r"not the latents of its shard \(.*\); remove it and encode its images"):
        shards.read(1, 1, torch.empty(2, 1, 1))
    shards.read(0, 1, torch.empty(2, 1, 1))


def test_a_file_of_another_shard_is_not_read(written: tuple[Manifest, Path, list[Path]]) -> None:
    found, folder, files = written
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(StreamError, match="not the latents of its shard"):
        LatentShards(folder, found, RESOLUTION).read(1, 1, torch.empty(2, 1, 1))
    files[2].unlink()
    with pytest.raises(ManifestError, match=r"lacks the latents of 1 of 3 shards; make them with `python -m data_pip"):
        LatentShards(folder, found, RESOLUTION)
    # A source that takes no part needs none.
    LatentShards(folder, found, RESOLUTION, shards=[0, 1]).close()


def with_latents(folder: Path, samples: Mapping[str, Mapping[str, bytes]], rows: list[int], **settings: Any) -> Path:
    """A manifest of samples in its folder, and beside it latents of some of its rows: of row n the number n."""
    write_tar(folder / "shards" / "0.tar", samples)
    index({}, folder / "manifest", own=[folder / "shards"], **settings)
    found, description = Manifest(folder / "manifest"), LatentDescription(32, 32, (2, 1, 1), "a0", "fp32")
    (folder / "32").mkdir()
    (folder / "32" / DESCRIPTION_FILE).write_text(json.dumps(description.to_dict()))
    file, numbers = folder / "32" / file_name(found.paths[0], found.hashes[0]), np.array(rows, np.int32)
    moments = np.repeat(numbers, 2).astype(np.float16).reshape(-1, 2, 1, 1)
    offsets = found.rows(0).offset[numbers]
    write_latents(file, description, found.hashes[0], numbers, offsets, numbers < 0, moments)
    return folder / "manifest"


def ramp() -> bytes:
    """An image 128 pixels wide and 32 high, whose columns are their numbers."""
    file = io.BytesIO()
    Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (32, 1))).save(file, "PNG")
    return file.getvalue()


def first_batch(manifest: Path, size: int, **settings: Any) -> Batch:
    stream = PairStream(manifest, seed=3, resolution=32, global_batch_size=size, **settings)
    batch = next(iter(stream))
    stream.close()
    return batch


def test_images_beside_latents_are_cropped_as_they_were_encoded(tmp_path: Path) -> None:
    """At the centre, though a run without latents crops at random."""
    samples = {str(row): {"png": ramp(), "txt": b"a ramp"} for row in range(4)}
    manifest = with_latents(tmp_path, samples, [0, 1, 2, 3])
    columns = first_batch(manifest, 4, latents=str(tmp_path)).samples["image"][:, 0, 0, 0]
    assert columns.tolist() == [48] * 4
    assert len(first_batch(manifest, 4).samples["image"][:, 0, 0, 0].unique()) > 1


def test_samples_without_an_image_have_no_latent(tmp_path: Path) -> None:
    samples = {str(row): {("wav" if row in (1, 2) else "png"): ramp(), "txt": str(row).encode()} for row in range(5)}
    manifest = with_latents(tmp_path, samples, [0, 3, 4], members=MEMBERS)
    batch = first_batch(manifest, 5, latents=str(tmp_path), members=READERS)
    rows = batch.rows["image"].tolist()
    assert len(rows) == 3
    assert batch.moments["image"][:, 0, 0, 0].tolist() == [float(batch.samples["text"][row]) for row in rows]


def test_latents_that_do_not_go_with_the_run_are_refused(written: tuple[Manifest, Path, list[Path]]) -> None:
    found, folder, _ = written
    with pytest.raises(ManifestError, match=r"no latents of resolution 64; make them .*resolutions=\[64\]"):
        LatentShards(folder, found, 64)
    with pytest.raises(ManifestError, match=r"was built with VAE a0, but the model's VAE is b1"):
        LatentShards(folder, found, RESOLUTION, vae="b1")
    with pytest.raises(ManifestError, match=r"built with min_side=32, but this run asks for .*min_side=16"):
        LatentShards(folder, found, RESOLUTION, min_side=16)
    description = folder / "32" / DESCRIPTION_FILE
    description.write_text(description.read_text().replace('"layout": 2', '"layout": 1'))
    with pytest.raises(ManifestError, match=r"cannot be used \(its layout is 1, this version reads layout 2\); remove"):
        LatentShards(folder, found, RESOLUTION)


def test_a_fingerprint_follows_contents_and_not_places(tmp_path: Path) -> None:
    weights, copy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    weights.write_bytes(b"one")
    copy.write_bytes(b"one")
    arguments = {"_target_": "x.Y", "widths": [1, 2], "weights": str(weights)}
    first = fingerprint(arguments, "vae")
    assert fingerprint({**arguments, "weights": str(copy)}, "vae") == first
    assert fingerprint({**arguments, "widths": [1, 3]}, "vae") != first
    copy.write_bytes(b"two")
    assert fingerprint({**arguments, "weights": str(copy)}, "vae") != first
    with pytest.raises(ValueError, match=r"vae\.weights=null: random weights"):
        fingerprint({**arguments, "weights": None}, "vae")
    with pytest.raises(ValueError, match=r"vae\.weights=.*c\.safetensors: no such file"):
        fingerprint({**arguments, "weights": str(tmp_path / "c.safetensors")}, "vae")
