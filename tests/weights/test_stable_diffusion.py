"""A U-Net in CompVis' layout becomes the start of stage 1."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vdtrain.compose import ConfigError, compose, to_object
from vdtrain.config import TrainConfig
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.layer_plan import make_plan
from vdtrain.training.trainer import load_weights
from vdtrain.weights.stable_diffusion_v1 import LIGHTNING_CLASS, UNET_PREFIX, layer_names, read_stable_diffusion

MODEL = to_object(compose("train", ["model=tiny"]), TrainConfig).model
PLAN = make_plan(MODEL.diffuser)
MODALITIES = ["image", "text"]


@pytest.fixture(scope="module")
def unet() -> dict[str, torch.Tensor]:
    """A tiny U-Net's state dict under CompVis' names, every tensor another one."""
    diffuser = Diffuser(MODEL, ["global", "data.image", "context.image"], seed=1)
    generator = torch.Generator().manual_seed(0)
    data, context = layer_names(PLAN)
    tensors = {}
    for name, parameter in diffuser.named_parameters():
        kind, _, rest = name.partition(".")
        if kind == "global_layers":
            key = f"time_embed.{rest}"
        else:
            _, index, tail = rest.split(".", 2)
            key = f"{(data if kind == 'data_layers' else context)[int(index)]}.{tail}"
        tensors[UNET_PREFIX + key] = torch.randn(parameter.shape, generator=generator)
    return tensors


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_global_image_and_both_contexts_start_from_it(
    unet: dict[str, torch.Tensor], tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"sd{suffix}"
    others = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1)}
    if suffix == ".ckpt":
        torch.save({"state_dict": {**unet, **others}, "global_step": 3}, file)
    else:
        save_file({**unet, **others}, file)
    weights = read_stable_diffusion(file, PLAN, "image", MODALITIES)
    diffuser = Diffuser(MODEL, active_groups(all_flows(MODALITIES)))
    fresh = {name: tensor.clone() for name, tensor in diffuser.state_dict().items()}
    load_weights(diffuser, weights)
    loaded = diffuser.state_dict()
    for name, tensor in loaded.items():
        if name.startswith("data_layers.text"):
            assert torch.equal(tensor, fresh[name])
        elif name.startswith("context_layers.text"):
            assert torch.equal(tensor, loaded[name.replace(".text.", ".image.", 1)])
        else:
            assert not torch.equal(tensor, fresh[name])
    assert sorted(float(tensor.sum()) for name, tensor in weights.items() if ".text." not in name) == sorted(
        float(tensor.sum()) for tensor in unet.values()
    )


def test_the_published_file_names_a_class_that_is_not_needed(
    unet: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sd-v1-4.ckpt keeps its callbacks under Lightning's class, which is neither installed nor built from the file."""
    name = LIGHTNING_CLASS.rpartition(".")
    module = types.ModuleType(name[0])
    setattr(module, name[2], type(name[2], (), {"__module__": name[0]}))
    file = tmp_path / "sd.ckpt"
    with monkeypatch.context() as patch:
        for package in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, name[0], module)
        torch.save({"state_dict": unet, "callbacks": {getattr(module, name[2]): {"best": torch.ones(1)}}}, file)
    assert read_stable_diffusion(file, PLAN, "image", MODALITIES)


def test_code_in_a_pickle_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    file = tmp_path / "sd.ckpt"
    with file.open("wb") as stream:
        pickle.dump({"state_dict": Payload()}, stream, protocol=2)
    with pytest.raises(ConfigError, match=r"stage\.init_from=.*cannot be read as plain tensors"):
        read_stable_diffusion(file, PLAN, "image", MODALITIES)
    assert not (tmp_path / "ran").exists()


def test_another_network_is_refused(unet: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="no keys below"):
        read_stable_diffusion(tmp_path / "other.safetensors", PLAN, "image", MODALITIES)
    save_file({**unet, UNET_PREFIX + "label_emb.0.weight": torch.zeros(1)}, tmp_path / "larger.safetensors")
    with pytest.raises(ConfigError, match=r"label_emb\.0\.weight has no place"):
        read_stable_diffusion(tmp_path / "larger.safetensors", PLAN, "image", MODALITIES)


def test_incomplete_weights_are_refused(unet: dict[str, torch.Tensor], tmp_path: Path) -> None:
    fewer = dict(unet)
    del fewer[UNET_PREFIX + "out.2.bias"]
    save_file(fewer, tmp_path / "fewer.safetensors")
    weights = read_stable_diffusion(tmp_path / "fewer.safetensors", PLAN, "image", MODALITIES)
    with pytest.raises(ConfigError, match=r"1 missing weights, e\.g\. data_layers\.image\.\d+\.2\.bias"):
        load_weights(Diffuser(MODEL, active_groups(all_flows(MODALITIES))), weights)
