"""Contexts: captions and images as the token sequences that the diffuser's cross-attention reads.

Both come from one CLIP (Radford et al. 2021), built and run by open_clip. Versatile Diffusion applies the final
normalisation and the projection to every token. It divides all tokens by the norm of the projected pooled token. The
global token therefore has length 1, and the others keep their size relative to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import open_clip
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as image_functional  # type: ignore[import-untyped]

from vdtrain.models.frozen_weights import device_and_dtype, load_weights, shared_module
from vdtrain.models.tokenizers import ClipTokenizer

Blank = Literal["zeros", "black", "grey"]
# Towers of other libraries, which open_clip builds from what it downloads.
FETCHED = {"text_cfg": "hf_model_name", "vision_cfg": "timm_model_name"}
BLANK_LEVELS = {"black": 0, "grey": 127}


def build_clip(architecture: str | Mapping[str, Any], weights: str | None) -> open_clip.CLIP:
    """Build a CLIP; within `shared_loading`, the same architecture and weights give the same module.

    Args:
        architecture: name of an open_clip model, such as "ViT-L-14-quickgelu", or a mapping in the form of its model
            files (embed_dim, vision_cfg, text_cfg, quick_gelu).
        weights: safetensors file with open_clip's key names; None leaves random weights, which are never shared.

    Raises:
        ValueError: open_clip does not know the architecture, or its image encoder is not a vision transformer.
        WeightsError: the weights are missing, or belong to another model.
    """
    config = _architecture(architecture)
    for tower, name in FETCHED.items():
        if (config.get(tower) or {}).get(name):
            raise ValueError(f"context_encoder.architecture.{tower}.{name}: not built, because open_clip fetches it")
    if weights is None:
        return _build(config)

    def load() -> open_clip.CLIP:
        clip = _build(config)
        load_weights(clip, weights, "context_encoder.weights")
        return clip

    return shared_module(json.dumps([config, weights], sort_keys=True), load)


def _build(config: dict[str, Any]) -> open_clip.CLIP:
    try:
        clip = open_clip.CLIP(**config)
    except TypeError as error:
        raise ValueError(f"context_encoder.architecture: {error}; give the keys of open_clip's model files") from error
    if not isinstance(clip.visual, open_clip.transformer.VisionTransformer):
        raise ValueError("context_encoder.architecture: image encoder is not a vision transformer; choose a ViT model")
    return clip


class ClipTextContext(nn.Module):
    """Captions to contexts [B, L, D], L the text context length and D the embedding size (77 and 768 in ViT-L/14).

    Args:
        architecture, weights: see `build_clip`; an image context with the same arguments shares the model.
        tokenizer: `tokenizers` JSON file whose largest id is the end-of-text token; None uses CLIP's own vocabulary.
    """

    def __init__(
        self, architecture: str | Mapping[str, Any], tokenizer: str | None = None, weights: str | None = None
    ) -> None:
        super().__init__()
        self.clip = build_clip(architecture, weights)
        self.tokenizer = ClipTokenizer(tokenizer, self.clip.context_length)
        if self.tokenizer.size != self.clip.vocab_size:
            raise ValueError(
                f"context_encoder.architecture.text_cfg.vocab_size={self.clip.vocab_size}: "
                f"the tokenizer {tokenizer or 'of CLIP'} has {self.tokenizer.size} entries; set vocab_size to that"
            )

    def prepare(self, captions: Sequence[str]) -> Tensor:
        """Token ids int64 [B, L] of captions."""
        return self.tokenizer(captions)

    def encode(self, captions: Sequence[str] | Tensor) -> Tensor:
        """Encode captions, or the ids that `prepare` returned, into [B, L, D] in the dtype of the parameters.

        Padding stays in the context; no token is masked.
        """
        return self.encode_ids(captions if isinstance(captions, Tensor) else self.tokenizer(captions))

    def blocks(self) -> list[nn.Module]:
        """The text transformer's blocks, for compilation."""
        return list(self.clip.transformer.resblocks)

    def encode_ids(self, ids: Tensor) -> Tensor:
        """`encode` for ids int64 [B, L], padded with the end-of-text id, which is the largest of the vocabulary."""
        clip = self.clip
        device, _ = device_and_dtype(clip)
        ids = ids.to(device)
        hidden = clip.token_embedding(ids) + clip.positional_embedding
        hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask))
        tokens: Tensor = hidden @ clip.text_projection
        # The pooled token is the first end-of-text one: argmax returns the first of equal values.
        pooled = tokens[torch.arange(len(ids), device=device), ids.argmax(dim=-1)]
        context: Tensor = tokens / pooled.norm(dim=-1)[:, None, None]
        return context

    def unconditional(self, batch: int, output: str) -> Tensor:
        """The unconditional context [batch, L, D]: the encoding of "", the same for every output modality."""
        return self.encode([""]).expand(batch, -1, -1)


class ClipImageContext(nn.Module):
    """Images to contexts [B, 1 + patches, D], the global token first (257 tokens of 768 in ViT-L/14 at 224 pixels).

    Args:
        architecture, weights: see `build_clip`; a text context with the same arguments shares the model.
        blank: the unconditional context: "zeros", or the encoding of a "black" or "grey" image.
        blank_for: exceptions to `blank`, by output modality.
    """

    def __init__(
        self,
        architecture: str | Mapping[str, Any],
        weights: str | None = None,
        blank: Blank = "zeros",
        blank_for: Mapping[str, Blank] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        for given in (blank, *blank_for.values()):
            if given != "zeros" and given not in BLANK_LEVELS:
                raise ValueError(f"context_encoder.blank={given}: choose one of zeros, {', '.join(BLANK_LEVELS)}")
        self.clip = build_clip(architecture, weights)
        self.blank, self.blank_for = blank, dict(blank_for)
        self.side = int(self.clip.visual.image_size[0])

    def encode(self, images: Tensor) -> Tensor:
        """Encode images uint8 [B, 3, H, W] of any size into [B, 1 + patches, D] in the dtype of the parameters."""
        return self.encode_pixels(self.preprocess(images))

    def blocks(self) -> list[nn.Module]:
        """The vision transformer's blocks, for compilation."""
        return list(self.clip.visual.transformer.resblocks)

    def encode_masked(self, images: Tensor, masks: Tensor) -> Tensor:
        """`encode` with masks [B, 1, h, w] in 0..1, resized to CLIP's cropped input; 0 hides a part of the image."""
        return self.encode_pixels(self.preprocess(images), masks)

    def preprocess(self, images: Tensor) -> Tensor:
        """CLIP's own preprocessing: uint8 [B, 3, H, W] to normalised [B, 3, side, side].

        A bicubic, antialiased resize of the shorter side (on uint8, as in CLIP), a centre crop, mean and deviation.
        """
        device, dtype = device_and_dtype(self.clip)
        images = images.to(device)
        height, width = images.shape[-2:]
        if min(height, width) != self.side:
            images = image_functional.resize(
                images, [self.side], interpolation=InterpolationMode.BICUBIC, antialias=True
            )
        images = image_functional.center_crop(images, [self.side])
        pixels = images.float() / 255
        # By numbers: a tensor of them would be copied to the GPU in every call, which waits for it.
        normalisation = zip(pixels.unbind(1), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, strict=True)
        for channel, mean, deviation in normalisation:
            channel.sub_(mean).div_(deviation)
        return pixels.to(dtype)

    def encode_pixels(self, pixels: Tensor, masks: Tensor | None = None) -> Tensor:
        """`encode` for the pixels [B, 3, side, side] that `preprocess` returns."""
        visual = self.clip.visual
        patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
        start = visual.class_embedding.expand(len(pixels), 1, -1)
        hidden = torch.cat([start, patches], dim=1) + visual.positional_embedding
        weights = None if masks is None else self._token_weights(masks.to(hidden))
        if weights is not None:
            hidden = hidden * weights
        # CLIP itself applies the last normalisation to the global token alone; a context has all tokens.
        tokens = visual.ln_post(visual.transformer(visual.ln_pre(hidden))) @ visual.proj
        context: Tensor = tokens / tokens[:, :1].norm(dim=-1, keepdim=True)
        return context if weights is None else context * weights

    def _token_weights(self, masks: Tensor) -> Tensor:
        """Weight [B, 1 + patches, 1] of each token: the mask's mean over the image, then over each patch."""
        masks = functional.interpolate(masks, (self.side, self.side), mode="bilinear")
        patches = functional.avg_pool2d(masks, self.clip.visual.patch_size)
        return torch.cat([masks.mean(dim=(2, 3)), patches.flatten(1)], dim=1)[..., None]

    def unconditional(self, batch: int, output: str) -> Tensor:
        """The unconditional context [batch, 1 + patches, D] for generating the modality `output`."""
        device, dtype = device_and_dtype(self.clip)
        blank = self.blank_for.get(output, self.blank)
        if blank == "zeros":
            rows, size = self.clip.visual.positional_embedding.shape[0], self.clip.visual.proj.shape[1]
            return torch.zeros((batch, rows, size), device=device, dtype=dtype)
        image = torch.full((1, 3, self.side, self.side), BLANK_LEVELS[blank], dtype=torch.uint8, device=device)
        return self.encode(image).expand(batch, -1, -1)


def _architecture(architecture: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(architecture, str):
        config = open_clip.get_model_config(architecture)
        if config is None:
            raise ValueError(
                f"context_encoder.architecture={architecture}: not a model of open_clip (open_clip.list_models())"
            )
        return dict(config)
    if isinstance(architecture, DictConfig):
        container: Any = OmegaConf.to_container(architecture, resolve=True)
        return dict(container)
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in architecture.items()}
