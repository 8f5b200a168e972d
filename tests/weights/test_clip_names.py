"""CLIP under both libraries' names: all of them, and the same bits there and back."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from vdtrain.models.clip import build_clip
from vdtrain.weights.published.frozen_names import to_hugging_face, to_open_clip


@pytest.fixture(scope="module")
def hugging_face() -> dict[str, torch.Tensor]:
    """ViT-L/14 without values: names and shapes."""
    tower = {"num_hidden_layers": 12, "projection_dim": 768}
    text = {**tower, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
    with torch.device("meta"):
        config = CLIPConfig(
            text_config=text, vision_config={**tower, **vision, "num_hidden_layers": 24}, projection_dim=768
        )
        return CLIPModel(config).state_dict()


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def test_names_and_shapes_of_both_at_full_size(hugging_face: dict[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        own = build_clip("ViT-L-14-quickgelu", None).state_dict()
    ids = {f"{tower}_model.embeddings.position_ids": torch.zeros(1, 77) for tower in ("text", "vision")}
    assert shapes(to_open_clip({**hugging_face, **ids})) == shapes(own)
    assert shapes(to_hugging_face(own)) == shapes(hugging_face)


def test_there_and_back_is_the_same(hugging_face: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = {name: tensor for name, tensor in hugging_face.items() if ".layers." not in name or ".layers.3." in name}
    state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in kept.items()}
    back = to_hugging_face(to_open_clip(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_foreign_and_incomplete_tensors_stay_visible() -> None:
    foreign = {"classifier.weight": torch.ones(1), "text_model.encoder.layers.0.adapter.weight": torch.ones(1)}
    assert set(to_open_clip(foreign)) == {"classifier.weight", "transformer.resblocks.0.adapter.weight"}
    query = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert to_open_clip({query: torch.ones(3, 3)})["transformer.resblocks.0.attn.in_proj_weight"].shape == (3, 3)
