"""A model as a folder of diffusers, and back: nothing is lost, nothing half-written or foreign is taken."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VersatileDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.flows import GLOBAL_GROUP, active_groups, all_flows
from vdtrain.models.diffuser import Diffuser, layer_group
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights import folder as shards
from vdtrain.weights.published import diffusers_folder
from vdtrain.weights.published.diffusers_folder import write_pipeline
from vdtrain.weights.published.diffusers_names import open_pipeline, unets
from vdtrain.weights.tensor_files import Entry, LazyTensors

MODEL: ModelConfig = to_object(compose("train", ["model=tiny"]), TrainConfig).model


def random_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = Diffuser(MODEL, active_groups(all_flows(MODEL.modalities))).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in shapes.items()}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors()


@pytest.fixture(scope="module")
def written(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    write_pipeline(folder, tensors, MODEL)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def assert_identical(found: Any, expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_out_and_back_is_the_identity(written: Path, tensors: dict[str, Tensor]) -> None:
    assert_identical(open_pipeline(written, MODEL), tensors)
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_configurations_describe_the_full_size() -> None:
    """diffusers builds, from the sizes that are written, networks with every tensor of the diffuser and no other."""
    full: ModelConfig = to_object(compose("train", []), TrainConfig).model
    diffuser, names_by_unet = unets(full)
    own = diffuser.state_dict()
    for part, names in names_by_unet.items():
        unet = diffusers_folder.meta_unet(full, diffuser, names)
        expected = {key: tensor.shape for name, tensor in own.items() if (key := names.to_diffusers(name))}
        assert {key: tensor.shape for key, tensor in unet.state_dict().items()} == expected, part
        assert unet.mid_block.attentions[0].transformer_blocks[0].attn1.heads == 8
        assert unet.config.sample_size == 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_precision_is_kept_and_the_frozen_parts_have_it_too(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = random_tensors(dtype)
    write_pipeline(tmp_path / "half", tensors, MODEL)
    assert_identical(open_pipeline(tmp_path / "half", MODEL), tensors)
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model", "image_encoder/model"):
        assert {tensor.dtype for tensor in load_file(tmp_path / "half" / f"{part}.safetensors").values()} == {dtype}


def test_large_unets_come_in_shards_each_tensor_read_when_written(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 400_000)
    reads: Counter[str] = Counter()

    def counted(name: str, tensor: Tensor) -> Entry:
        def read() -> Tensor:
            reads[name] += 1
            return tensor

        return Entry(tensor.shape, tensor.dtype, read)

    lazy = LazyTensors({name: counted(name, tensor) for name, tensor in tensors.items()})
    write_pipeline(tmp_path / "shards", lazy, MODEL)
    # Each of the two U-Nets has a copy of the global layers.
    assert reads == {name: 2 if layer_group(name) == GLOBAL_GROUP else 1 for name in tensors}
    files = sorted((tmp_path / "shards" / "text_unet").glob("*.safetensors"))
    assert len(files) > 3
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert all(file.stat().st_size < 400_000 + largest for file in files)
    assert_identical(open_pipeline(tmp_path / "shards", MODEL), tensors)
    loaded = VersatileDiffusionPipeline.from_pretrained(tmp_path / "shards")
    assert torch.equal(loaded.text_unet.conv_in.weight, tensors["data_layers.text.0.weight"])


@pytest.mark.parametrize("published", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"])
def test_a_folder_as_published_is_opened(folder: Path, tensors: dict[str, Tensor], published: str) -> None:
    for part in ("image_unet", "text_unet"):
        file = folder / part / "diffusion_pytorch_model.safetensors"
        state = {name: tensor.half() for name, tensor in load_file(file).items()}
        file.unlink()
        if published.endswith(".bin"):
            torch.save(state, folder / part / published)
        else:
            save_file(state, folder / part / published)
    assert_identical(open_pipeline(folder, MODEL), {name: tensor.half() for name, tensor in tensors.items()})


def test_weights_of_an_earlier_stage_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    stage2 = {name: tensor for name, tensor in tensors.items() if layer_group(name) != "data.text"}
    with pytest.raises(WeightsError, match=r"^target=.*/out: no layers of data\.text; give weights of the last stage$"):
        write_pipeline(tmp_path / "out", stage2, MODEL, "target")
    fewer = {name: tensor for name, tensor in tensors.items() if name != "global_layers.0.bias"}
    with pytest.raises(WeightsError, match=r"missing global_layers\.0\.bias"):
        write_pipeline(tmp_path / "out", fewer, MODEL)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(written: Path, tensors: dict[str, Tensor]) -> None:
    before = sorted(written.rglob("*"))
    with pytest.raises(ConfigError, match=r"folder=.*tiny exists already"):
        write_pipeline(written, tensors, MODEL)
    assert sorted(written.rglob("*")) == before


def test_a_failure_leaves_nothing_behind(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        assert not (tmp_path / "out").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers_folder, "write_vae", full)
    with pytest.raises(ConfigError, match=r"folder=.*out: cannot be written \(.*No space left"):
        write_pipeline(tmp_path / "out", tensors, MODEL)
    assert not list(tmp_path.iterdir())


def test_models_that_diffusers_cannot_hold_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    other: ModelConfig = to_object(compose("train", ["model=tiny"]), TrainConfig).model
    other.modalities["text"].data_layers["tokens"] = 2
    with pytest.raises(WeightsError, match=r"model\.modalities\.text\.data_layers\.tokens=2: diffusers has 4"):
        write_pipeline(tmp_path / "out", tensors, other)
    del other.modalities["text"]
    with pytest.raises(WeightsError, match=r"model\.modalities=image: diffusers' pipelines have one modality"):
        write_pipeline(tmp_path / "out", tensors, other)


def test_a_folder_is_replaced_as_a_whole(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / "text_unet" / "old.safetensors").touch()
    changed = tensors | {"global_layers.0.bias": torch.ones_like(tensors["global_layers.0.bias"])}
    write_pipeline(folder, changed, MODEL, overwrite=True)
    assert_identical(open_pipeline(folder, MODEL), changed)
    assert not (folder / "text_unet" / "old.safetensors").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def change(folder: Path, part: str, changes: dict[str, Tensor]) -> None:
    file = folder / part / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | changes, file)


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as refused:
        open_pipeline(folder, MODEL, "source")
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"source={folder}")
    return line


def test_differing_time_embeddings_are_refused(folder: Path) -> None:
    change(folder, "text_unet", {"time_embedding.linear_2.bias": torch.ones(256)})
    assert "time_embedding.linear_2.bias differs between image_unet and text_unet" in refusal(folder)


def test_other_networks_are_refused(folder: Path) -> None:
    change(folder, "image_unet", {"conv_in.weight": torch.zeros(64, 9, 3, 3)})
    assert "shape data_layers.image.0.weight [64, 9, 3, 3] instead of [64, 4, 3, 3]" in refusal(folder)
    change(folder, "image_unet", {"class_embedding.weight": torch.zeros(1)})
    assert "image_unet: class_embedding.weight has no place in the model" in refusal(folder)
    config = folder / "image_unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": 8}))
    assert "image_unet: attention_head_dim is 8 in config.json, and the model has 4" in refusal(folder)
    config.write_text("[")
    assert "config.json is not a JSON object" in refusal(folder)


def test_missing_parts_are_refused(folder: Path) -> None:
    shutil.rmtree(folder / "text_unet")
    assert "text_unet: no such file" in refusal(folder)
