"""CLIP's encoders and tokenizer as Hugging Face's classes load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.models.clip import ClipImageContext, ClipTextContext, build_clip
from vdtrain.models.frozen_weights import WeightsError, untied
from vdtrain.models.tokenizers import ClipTokenizer
from vdtrain.weights.published.diffusers_folder import (
    _write_tokenizer,
    write_image_encoder,
    write_text_encoder,
    write_vae,
)

CAPTIONS = ["a red circle", "It's 12 o'clock; ÜNÏCODE ☃ & <tags>", "", "two\n\tlines", "word " * 100]


def model_with(tmp_path: Path, **architecture: Any) -> ModelConfig:
    """The tiny model with another CLIP of random weights."""
    model: ModelConfig = to_object(compose("train", ["model=tiny"]), TrainConfig).model
    image, text = (model.modalities[name].context_encoder for name in ("image", "text"))
    chosen = image["architecture"] | architecture
    clip = build_clip(chosen, None)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_file(untied(clip), tmp_path / "clip.safetensors")
    for encoder in (image, text):
        encoder |= {"architecture": chosen, "weights": str(tmp_path / "clip.safetensors")}
    return model


@pytest.mark.parametrize(("quick", "name"), [(True, "quick_gelu"), (False, "gelu")])
@torch.no_grad()
def test_encoders_give_the_same_with_either_activation(quick: bool, name: str, tmp_path: Path) -> None:
    model = model_with(tmp_path, quick_gelu=quick)
    write_text_encoder(tmp_path / "text", tmp_path / "tokenizer", model, "text", torch.float32)
    write_image_encoder(tmp_path / "image", tmp_path / "processor", model, "image", torch.float32)
    arguments = {key: value for key, value in model.modalities["text"].context_encoder.items() if key != "_target_"}
    text = ClipTextContext(**arguments)
    ids = text.tokenizer(CAPTIONS)
    theirs: Any = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text").eval()
    assert theirs.config.hidden_act == name
    out = theirs(ids)
    context = theirs.text_projection(out.last_hidden_state) / out.text_embeds.norm(dim=-1)[:, None, None]
    torch.testing.assert_close(text.encode_ids(ids), context, atol=1e-5, rtol=0)

    image = ClipImageContext(arguments["architecture"], arguments["weights"])
    pixels = torch.randn(2, 3, 32, 32)
    theirs = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "image").eval()
    assert theirs.config.hidden_act == name
    hidden = theirs.vision_model.post_layernorm(theirs.vision_model(pixels).last_hidden_state)
    context = theirs.visual_projection(hidden)
    context = context / context[:, :1].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(image.encode_pixels(pixels), context, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("path", "length"), [(None, 77), ("asset:tiny/clip_tokenizer.json", 24)], ids=["CLIP", "tiny"])
def test_tokenizers_agree(path: str | None, length: int, tmp_path: Path) -> None:
    _write_tokenizer(tmp_path / "tokenizer", path, "tokenizer", length)
    theirs: Any = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert theirs.model_max_length == length
    ours = ClipTokenizer(path, length)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.size - 2,
        ours.size - 1,
        ours.size - 1,
    )
    ids = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    assert torch.equal(ids, ours(CAPTIONS))


def test_parts_without_a_counterpart_are_refused(tmp_path: Path) -> None:
    model = model_with(tmp_path)
    sizes = model.modalities["image"].context_encoder["architecture"]["vision_cfg"]
    scaled = model_with(tmp_path, vision_cfg={**sizes, "ls_init_value": 0.1})
    with pytest.raises(WeightsError, match=r"not a CLIP that Hugging Face's classes can run: unexpected .*ls_1"):
        write_image_encoder(tmp_path / "image", tmp_path / "processor", scaled, "image", torch.float32)
    model.modalities["image"].vae = model.modalities["text"].vae
    with pytest.raises(WeightsError, match=r"image\.vae\._target_=Optimus: diffusers has only .* ImageVAE"):
        write_vae(tmp_path / "vae", model, "image", torch.float32)
    assert not (tmp_path / "vae").exists()
