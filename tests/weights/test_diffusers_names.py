"""Every parameter of the diffuser has its key in diffusers' U-Nets, and every key its parameter, at full size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.layer_plan import make_plan
from vdtrain.weights.published.diffusers_names import Kind, UnetNames

MODEL: ModelConfig = to_object(compose("train", []), TrainConfig).model
KINDS: dict[Kind, tuple[str, Any, dict[str, Any]]] = {
    "image": ("image", UNet2DConditionModel, {}),
    "flat": ("text", UNetFlatConditionModel, {"in_channels": [768, 1, 1], "out_channels": [768, 1, 1]}),
}


@pytest.mark.parametrize("kind", ["image", "flat"])
def test_names_and_shapes_are_those_of_the_unet(kind: Kind) -> None:
    modality, unet, arguments = KINDS[kind]
    with torch.device("meta"):
        # The sizes not given here are the class's own defaults: Versatile Diffusion's.
        theirs = unet(cross_attention_dim=768, **arguments).state_dict()
        own = Diffuser(MODEL, ["global", f"data.{modality}", f"context.{modality}"]).state_dict()
    names = UnetNames(make_plan(MODEL.diffuser), kind, modality, modality)
    assert {names.to_diffusers(name): tensor.shape for name, tensor in own.items()} == {
        key: tensor.shape for key, tensor in theirs.items()
    }
    assert {names.to_own(key) for key in theirs} == set(own)
    assert len(own) == 686


def test_layers_of_other_modalities_and_foreign_keys_have_no_name() -> None:
    names = UnetNames(make_plan(MODEL.diffuser), "image", "image", "text")
    assert names.to_diffusers("data_layers.text.0.weight") is None
    assert names.to_diffusers("context_layers.image.0.norm.weight") is None
    assert names.to_diffusers("context_layers.text.6.norm.weight") == "mid_block.attentions.0.norm.weight"
    for foreign in ("class_embedding.weight", "down_blocks.3.attentions.0.norm.weight", "conv_in", ""):
        assert names.to_own(foreign) is None
