"""CLIP as a judge: embeddings of pictures and captions, and the score of a pair of them (Hessel et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdtrain.compose import ConfigError
from vdtrain.config import ModelConfig
from vdtrain.evaluation_config import ClipConfig
from vdtrain.instantiate import find_target, instantiate
from vdtrain.models.clip import ClipImageContext, ClipTextContext
from vdtrain.models.frozen_weights import freeze, locate, shared_loading

# Hessel et al. multiply by 2.5; most later papers report hundredths of a cosine.
SCALE = 100.0
ENCODERS = {"image": ClipImageContext, "text": ClipTextContext}


class ClipJudge(nn.Module):
    """One CLIP's embeddings, in float32, not normalised.

    Args:
        config: which CLIP; without an architecture that of `model`'s context encoders.

    Raises:
        ConfigError: the model's context encoders are no CLIP, or an architecture or weights that are not there.
    """

    def __init__(self, config: ClipConfig, model: ModelConfig) -> None:
        super().__init__()
        with shared_loading():
            image, text = _encoders(config, model)
        self.image, self.text = image, text
        freeze(self)

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of pictures uint8 [B, 3, H, W]."""
        found: Tensor = self.image.clip.encode_image(self.image.preprocess(images))
        return found

    @torch.no_grad()
    def captions(self, captions: list[str]) -> Tensor:
        """Embeddings [B, D] of captions."""
        device = self.text.clip.text_projection.device
        found: Tensor = self.text.clip.encode_text(self.text.prepare(captions).to(device))
        return found


def clip_scores(first: Tensor, second: Tensor) -> Tensor:
    """100 max(cosine, 0) for every pair of rows of two embeddings [N, D], float64 [N]."""
    return SCALE * torch.cosine_similarity(first.double(), second.double(), dim=-1).clamp(min=0)


def check_clip(config: ClipConfig, model: ModelConfig) -> None:
    """Refuse a CLIP that cannot be built, without building it.

    Raises:
        ConfigError: with the setting, its value and the remedy.
    """
    if config.architecture is not None:
        if config.weights is None:
            raise ConfigError("clip.weights: null, and an untrained CLIP scores nothing; give a safetensors file")
        for setting, file in (("clip.weights", config.weights), ("clip.tokenizer", config.tokenizer)):
            if file is not None:
                locate(file, setting)
        return
    if config.weights is not None or config.tokenizer is not None:
        raise ConfigError("clip.weights, clip.tokenizer: of a clip.architecture that is null; name that too")
    for name, encoder in ENCODERS.items():
        setting = f"model.modalities.{name}.context_encoder"
        specification = model.modalities[name].context_encoder if name in model.modalities else None
        if specification is None or find_target(specification, setting)[0] is not encoder:
            raise ConfigError(
                f"clip.architecture: null, and {setting} is no {encoder.__name__}; name a CLIP, with clip.weights"
            )
        if specification.get("weights") is not None:
            locate(specification["weights"], f"{setting}.weights")


def _encoders(config: ClipConfig, model: ModelConfig) -> tuple[ClipImageContext, ClipTextContext]:
    if config.architecture is None:
        image, text = (
            instantiate(model.modalities[name].context_encoder, f"model.modalities.{name}.context_encoder")
            for name in ENCODERS
        )
        return image, text
    try:
        return (
            ClipImageContext(config.architecture, config.weights),
            ClipTextContext(config.architecture, config.tokenizer, config.weights),
        )
    except ValueError as error:
        raise ConfigError(str(error).replace("context_encoder.", "clip.")) from error
