"""The full-size model on the meta device against the keys, shapes and parameter counts of the original classes."""

import json

import pytest
import torch
from torch import nn

from tests.parity.recorded import REFERENCE, rows
from vdtrain.config.compose import compose, to_object
from vdtrain.config.instantiate import instantiate
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.clip import build_clip
from vdtrain.models.diffuser import Diffuser
from vdtrain.weights.published.versatile_diffusion import to_released


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return to_object(compose("train", []), TrainConfig).model


@pytest.fixture(scope="module")
def diffuser(model: ModelConfig) -> Diffuser:
    with torch.device("meta"):
        return Diffuser(model, active_groups(all_flows(model.modalities)))


def shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor below a prefix of the original's keys."""
    return {
        row[0]: tuple(int(size) for size in row[1].strip("()").split(",") if size.strip())
        for row in rows("full_keys.txt")
        if len(row) == 3 and row[0].startswith(prefix)
    }


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_tensor_of_the_diffuser_has_the_released_key_and_shape(diffuser: Diffuser) -> None:
    ours = {to_released(name): tuple(tensor.shape) for name, tensor in diffuser.state_dict().items()}
    expected = shapes("diffuser.")
    assert len(expected) == 686 + 682
    assert ours == expected


def test_parameter_counts_of_the_frozen_parts(model: ModelConfig) -> None:
    expected = json.loads((REFERENCE / "full_counts.json").read_text())
    without_files = {"weights": None, "encoder_tokenizer": None, "decoder_tokenizer": None}
    with torch.device("meta"):
        image, text = (
            instantiate({key: without_files.get(key, value) for key, value in modality.vae.items()}, "vae")
            for modality in (model.modalities["image"], model.modalities["text"])
        )
        clip = build_clip(model.modalities["text"].context_encoder["architecture"], None)
    assert size(image) == expected["autokl"]
    assert size(text.encoder) == expected["optimus.encoder (BERT incl. connector linear)"]
    assert size(text.decoder) == expected["optimus.decoder (GPT-2, tied lm_head counted once)"]
    assert size(clip) == expected["clip ViT-L/14 (one copy; official keeps TWO)"]
