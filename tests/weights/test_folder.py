"""A weights folder gives back what went in, or says in a line what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.weights.small import MODEL, same, weights
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.files import written_whole
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.training.build import initial_weights, load_weights
from vdtrain.training.start import Start, open_weights, resolve_start
from vdtrain.weights import folder as shards
from vdtrain.weights.folder import (
    is_export,
    is_weights_folder,
    open_weights_folder,
    weights_folder_model,
    write_weights_folder,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Several shards."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 2**20)
    write_weights_folder(tmp_path / "w", weights(), MODEL)
    return tmp_path / "w"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_comes_out(tmp_path: Path, dtype: torch.dtype) -> None:
    write_weights_folder(tmp_path / "deep" / "w", weights(dtype), MODEL)
    found = tmp_path / "deep" / "w"
    assert is_weights_folder(found)
    assert same(open_weights_folder(found), weights(dtype))
    assert weights_folder_model(found) == MODEL
    assert sorted(path.name for path in found.iterdir()) == ["model.safetensors", "model.yaml", "weights.json"]


def test_shards_under_the_released_keys(folder: Path) -> None:
    assert same(open_weights_folder(folder), weights())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    with safe_open(files[0], framework="pt") as file:
        assert "diffuser.image.time_embed.0.weight" in file.keys()  # noqa: SIM118


def cut(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def flip(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def mix(folder: Path) -> None:
    write_weights_folder(folder.parent / "other", weights(seed=1), MODEL)
    name = min(folder.glob("*.safetensors")).name
    (folder.parent / "other" / name).replace(folder / name)


def edit(folder: Path) -> None:
    (folder / "model.yaml").write_text((folder / "model.yaml").read_text().replace("heads: 4", "heads: 8"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "truncated or foreign"),
        (flip, "checksum does not match"),
        (mix, "checksum does not match"),
        (edit, r"model\.yaml: its checksum does not match"),
        (lambda folder: max(folder.glob("*.safetensors")).unlink(), "cannot be read"),
        (lambda folder: (folder / "extra.safetensors").write_bytes(b"x"), "extra.safetensors does not belong to it"),
        (lambda folder: (folder / "weights.json").write_text("{"), "weights.json cannot be read"),
        (lambda folder: (folder / "weights.json").write_text('{"format": 2, "files": {}}'), "reads format 1"),
    ],
)
def test_damage_is_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(WeightsError, match=message):
        open_weights_folder(folder)


def test_what_fails_leaves_nothing_and_spares_what_was_there(folder: Path) -> None:
    class Failing(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            raise OSError(28, "No space left on device")

        def items(self) -> object:  # type: ignore[override]
            return ((name, self[name]) for name in self)

    with pytest.raises(ConfigError, match=r"output=.*exists already; overwrite=true replaces it"):
        write_weights_folder(folder, weights(), MODEL)
    with pytest.raises(ConfigError, match=r"output=.*No space left on device"):
        write_weights_folder(folder, Failing(weights()), MODEL, overwrite=True)
    assert same(open_weights_folder(folder), weights())
    write_weights_folder(folder, weights(seed=1), MODEL, overwrite=True)
    assert same(open_weights_folder(folder), weights(seed=1))
    assert [path.name for path in folder.parent.iterdir()] == ["w"]


def test_a_replacement_that_fails_at_the_last_moment_brings_the_old_one_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(draft: Path, target: Path) -> Path:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(ConfigError, match="Input/output error"):
            write_weights_folder(folder, weights(seed=1), MODEL, overwrite=True)
    assert same(open_weights_folder(folder), weights())
    assert [path.name for path in folder.parent.iterdir()] == ["w"]
    # What a killed process left between the two renamings comes back too.
    folder.rename(folder.with_name("w.replaced"))
    with pytest.raises(ConfigError, match="exists already"), written_whole(folder, "output=w", ours=is_export):
        pytest.fail("what came back would be replaced")
    assert same(open_weights_folder(folder), weights())


def config(*overrides: str) -> tuple[TrainConfig, object]:
    document = compose("train", ["model=tiny", "run_dir=nowhere", *overrides])
    return to_object(document, TrainConfig), document


def start(folder: str) -> Start:
    return resolve_start(*config(f"stage.init_from={folder}"))  # type: ignore[arg-type]


def test_a_stage_starts_from_it(folder: Path) -> None:
    found = initial_weights(start(str(folder)), MODEL)
    diffuser = Diffuser(MODEL, ["global", "data.image", "data.text", "context.image", "context.text"])
    load_weights(diffuser, found)
    assert same(diffuser.state_dict(), weights())
    model, opened = open_weights("checkpoint", str(folder))
    assert model == MODEL
    assert same(opened, weights())


def test_half_precision_fills_single(tmp_path: Path) -> None:
    write_weights_folder(tmp_path / "w", weights(torch.float16), MODEL)
    diffuser = Diffuser(MODEL, ["global", "data.image", "data.text", "context.image", "context.text"])
    load_weights(diffuser, initial_weights(Start(weights=tmp_path / "w"), MODEL))
    assert same(diffuser.state_dict(), {name: tensor.float() for name, tensor in weights(torch.float16).items()})


def test_another_model_is_refused(folder: Path) -> None:
    other = replace(MODEL, diffuser=replace(MODEL.diffuser, heads=2))
    with pytest.raises(ConfigError, match=r"stage\.init_from=.*heads=4.*this one has.*heads=2"):
        initial_weights(Start(weights=folder), other)


@pytest.mark.parametrize("name", ["sd-v1-4.ckpt", "sd.safetensors", "vd.pth"])
def test_published_files_are_imported_first(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"stage\.init_from=.*{name}: .*`vdtrain weights import stable_diffusion"):
        start(str(tmp_path / name))


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; .*vdtrain weights import"):
        start(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="no complete checkpoint and no imported weights"):
        start(str(tmp_path))
    (tmp_path / "weights.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=r"model\.yaml cannot be read"):
        open_weights("checkpoint", str(tmp_path))
