"""Which figures there are for which modality, and how they follow from features.

A *feature* is what one network makes of samples of one modality: "clip" of images and of captions, in one space, and
"inception" of images. A modality that is not in these tables gets no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdtrain.config.compose import ConfigError
from vdtrain.config.instantiate import find_target, instantiate
from vdtrain.config.schema import ClipConfig, ModelConfig
from vdtrain.evaluation.frechet import Statistics, frechet_distance
from vdtrain.evaluation.inception import InceptionFeatures
from vdtrain.flows import Flow
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
    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of images uint8 [B, 3, H, W]."""
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


CLIP, INCEPTION = "clip", "inception"
# Fréchet distances of an output modality: figure -> the feature that it is the distance of.
DISTANCES: Mapping[str, Mapping[str, str]] = {"image": {"fid": INCEPTION, "clip_distance": CLIP}}
# Modalities that the judge has an embedding of.
JUDGED = {"image", "text"}
# Images that go through a network together.
BATCH = 50

Network = Callable[[Any], Tensor]


def features_of(modality: str, with_inception: bool) -> set[str]:
    """Features of a modality that are wanted."""
    wanted = {CLIP} if modality in JUDGED else set()
    if with_inception and INCEPTION in DISTANCES.get(modality, {}).values():
        wanted.add(INCEPTION)
    return wanted


def networks(judge: ClipJudge, inception: InceptionFeatures | None) -> dict[tuple[str, str], Network]:
    """What makes which feature of which modality."""
    found: dict[tuple[str, str], Network] = {("image", CLIP): judge.embed_images, ("text", CLIP): judge.captions}
    if inception is not None:
        found["image", INCEPTION] = inception
    return found


def in_batches(network: Network, samples: Any) -> Tensor:
    """Features [N, D] of samples, on the CPU."""
    chunks = [samples[begin : begin + BATCH] for begin in range(0, len(samples), BATCH)]
    return torch.cat([network(chunk).float().cpu() for chunk in chunks])


@dataclass(frozen=True)
class Mean:
    """Mean of N values and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """Of at least two values [N]."""
        return cls(float(values.mean()), float(values.std() / len(values) ** 0.5))


def distances(flow: Flow, generated: Mapping[str, Tensor], real: Mapping[str, Statistics]) -> dict[str, float]:
    """Fréchet distances of generated features, by figure, to those in `real`, by feature."""
    found = {}
    for figure, feature in DISTANCES.get(flow.output, {}).items():
        if feature in generated and feature in real:
            try:
                found[figure] = frechet_distance(Statistics.of(generated[feature]), real[feature])
            except ValueError as error:
                raise ConfigError(f"flows: {flow}: {feature}: {error}; look at the samples") from error
    return found


def agreement(flow: Flow, generated: Mapping[str, Tensor], pairs: Mapping[str, Tensor]) -> Mean | None:
    """CLIP score of what was generated with what it was generated from; None where CLIP knows one of them not."""
    context = pairs.get(f"{flow.context}/{CLIP}")
    return None if context is None or CLIP not in generated else Mean.of(clip_scores(generated[CLIP], context))
