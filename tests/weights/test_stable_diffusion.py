"""A U-Net in CompVis' layout becomes the start of stage 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.weights.published import compvis_unet
from tests.weights.small import GROUPS, MODEL, PLAN, weights
from vdtrain.config.compose import ConfigError
from vdtrain.models.diffuser import Diffuser
from vdtrain.training.build import load_weights
from vdtrain.weights.published.stable_diffusion import UNET_PREFIX, open_stable_diffusion
from vdtrain.weights.tensor_files import LazyTensors


def opened(path: Path) -> LazyTensors:
    return open_stable_diffusion(path, MODEL, list(MODEL.modalities), "path")


@pytest.fixture(scope="module")
def unet() -> dict[str, torch.Tensor]:
    return compvis_unet()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_global_image_and_both_contexts_start_from_it(
    unet: dict[str, torch.Tensor], tmp_path: Path, suffix: str, dtype: torch.dtype
) -> None:
    file = tmp_path / f"sd{suffix}"
    unet = {key: tensor.to(dtype) for key, tensor in unet.items()}
    others = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1), "model_ema.timeembed0weight": torch.ones(1)}
    if suffix == ".ckpt":
        torch.save({"state_dict": {**unet, **others}, "global_step": 3}, file)
    else:
        save_file({**unet, **others}, file)
    found = opened(file)
    diffuser = Diffuser(MODEL, GROUPS)
    fresh = {name: tensor.clone() for name, tensor in diffuser.state_dict().items()}
    load_weights(diffuser, found)
    expected = weights(dtype)
    for name, tensor in diffuser.state_dict().items():
        if name.startswith("data_layers.text"):
            assert torch.equal(tensor, fresh[name])
            assert name not in found
        else:
            source = name.replace("context_layers.text.", "context_layers.image.", 1)
            assert torch.equal(tensor, expected[source].float())
            assert found[name].dtype == dtype


def test_a_diffusers_folder_gives_the_same(unet: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from vdtrain.weights.published.diffusers_names import UnetNames

    names = UnetNames(PLAN, "image", "image", "image")
    theirs = {names.to_diffusers(name): tensor for name, tensor in weights().items()}
    (tmp_path / "unet").mkdir()
    save_file(
        {key: tensor for key, tensor in theirs.items() if key}, tmp_path / "unet/diffusion_pytorch_model.safetensors"
    )
    torch.save(unet, tmp_path / "sd.ckpt")
    found, expected = opened(tmp_path), opened(tmp_path / "sd.ckpt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def refused(tensors: dict[str, torch.Tensor], file: Path, message: str) -> None:
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=rf"path=.*{file.name}: {message}"):
        opened(file)


def test_another_network_is_refused(unet: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = tmp_path / "sd.safetensors"
    refused({"conv_in.weight": torch.zeros(1)}, file, "no keys below")
    refused({**unet, UNET_PREFIX + "label_emb.0.weight": torch.zeros(1)}, file, r".*label_emb\.0\.weight has no place")
    fewer = {key: tensor for key, tensor in unet.items() if not key.endswith("out.2.bias")}
    refused(fewer, file, r"weights of another model than model=tiny: missing data_layers\.image\.\d+\.2\.bias$")
    wider = {**unet, UNET_PREFIX + "out.2.bias": torch.zeros(9)}
    refused(wider, file, r"weights of another model.*\.2\.bias \[9\] instead of \[4\]$")
