"""The metrics of each modality, and how they are computed from features.

A *feature* is one network's output for samples of one modality: "clip" for images and captions, in one space, and
"inception" for images. The module of another modality registers its metrics in `MODALITY_FIGURES`, with the feature
"own". An evaluation imports that module because a checkpoint's model names its classes, and only if `trust` admits it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vdtrain.config.command_schema import ClipConfig
from vdtrain.config.compose import ConfigError
from vdtrain.config.instantiate import find_target, instantiate
from vdtrain.config.schema import ModelConfig
from vdtrain.evaluation.distances import Statistics, frechet_distance, kernel_distance, precision_recall
from vdtrain.evaluation.inception import InceptionFeatures
from vdtrain.evaluation.parts import CONTEXT
from vdtrain.flows import Flow
from vdtrain.models.clip import ClipImageContext, ClipTextContext
from vdtrain.models.frozen_weights import freeze, locate, shared_loading

# The feature that a modality's own figures are computed from.
OWN = "own"


@dataclass(frozen=True)
class ModalityFigures:
    """How samples of a modality are measured.

    Attributes:
        features: samples [n] -> float [n, D], what the figures need of each sample. They are kept on the disk.
        figures: features [N, D] of generated samples, and of the real ones of the same pairs -> figures by name.
        columns: by figure, its title in the table and the format of its number, such as ("pitch error", ".2f").
    """

    features: Callable[[Any], Tensor]
    figures: Callable[[Tensor, Tensor], Mapping[str, float]]
    columns: Mapping[str, tuple[str, str]] = field(default_factory=dict)


MODALITY_FIGURES: dict[str, ModalityFigures] = {}


# Hessel et al. multiply the cosine by 2.5; most later papers multiply it by 100.
SCALE = 100.0
ENCODERS = {"image": ClipImageContext, "text": ClipTextContext}


class ClipScorer(nn.Module):
    """The embeddings of one CLIP, in float32, not normalised.

    Args:
        config: the CLIP to use; without an architecture, the CLIP of `model`'s context encoders.

    Raises:
        ConfigError: the architecture or its weights do not exist.
    """

    def __init__(self, config: ClipConfig, model: ModelConfig) -> None:
        super().__init__()
        with shared_loading():
            self.image, self.text = _encoders(config, model)
        freeze(self)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of images uint8 [B, 3, H, W]."""
        found: Tensor = self.image.clip.encode_image(self.image.preprocess(images))
        return found

    @torch.no_grad()
    def embed_captions(self, captions: list[str]) -> Tensor:
        """Embeddings [B, D] of captions."""
        device = self.text.clip.text_projection.device
        found: Tensor = self.text.clip.encode_text(self.text.prepare(captions).to(device))
        return found


def clip_scores(first: Tensor, second: Tensor) -> Tensor:
    """100 max(cosine, 0) of the rows of two embeddings [N, D], float64 [N]."""
    return SCALE * torch.cosine_similarity(first.double(), second.double(), dim=-1).clamp(min=0)


def check_clip(config: ClipConfig, model: ModelConfig) -> None:
    """Check the configuration of the CLIP, without building it.

    Raises:
        ConfigError: the CLIP cannot be built.
    """
    if config.architecture is not None:
        if config.weights is None:
            raise ConfigError("clip.weights: null, but an untrained CLIP cannot score; give a safetensors file")
        for setting, file in (("clip.weights", config.weights), ("clip.tokenizer", config.tokenizer)):
            if file is not None:
                locate(file, setting)
        return
    if config.weights is not None or config.tokenizer is not None:
        raise ConfigError("clip.weights, clip.tokenizer: need clip.architecture, which is null; name it too")
    for name, encoder in ENCODERS.items():
        setting = f"model.modalities.{name}.context_encoder"
        specification = model.modalities[name].context_encoder if name in model.modalities else None
        if specification is None or find_target(specification, setting)[0] is not encoder:
            raise ConfigError(
                f"clip.architecture: null, but {setting} is not a {encoder.__name__}; name a CLIP, with clip.weights"
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
# Fréchet distances of an output modality: metric -> the feature that it compares.
DISTANCES: Mapping[str, Mapping[str, str]] = {"image": {"fid": INCEPTION, "clip_distance": CLIP}}
# Modalities that CLIP can embed.
EMBEDDED = {"image", "text"}
# Samples per batch of a network.
BATCH = 50

Network = Callable[[Any], Tensor]


def features_of(modality: str, with_inception: bool) -> set[str]:
    """The features of a modality that its metrics need."""
    wanted = {CLIP} if modality in EMBEDDED else set()
    if modality in MODALITY_FIGURES:
        wanted.add(OWN)
    if with_inception and INCEPTION in DISTANCES.get(modality, {}).values():
        wanted.add(INCEPTION)
    return wanted


def networks(scorer: ClipScorer, inception: InceptionFeatures | None) -> dict[tuple[str, str], Network]:
    """(modality, feature) -> the network that computes it."""
    found: dict[tuple[str, str], Network] = {
        ("image", CLIP): scorer.embed_images,
        ("text", CLIP): scorer.embed_captions,
    }
    if inception is not None:
        found["image", INCEPTION] = inception
    found |= {(modality, OWN): each.features for modality, each in MODALITY_FIGURES.items()}
    return found


def in_batches(network: Network, samples: Any) -> Tensor:
    """Features [N, D] of samples, float32 on the CPU."""
    chunks = [samples[begin : begin + BATCH] for begin in range(0, len(samples), BATCH)]
    # Published figures use full float32, but PyTorch lets convolutions round to TF32 by default.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([network(chunk).float().cpu() for chunk in chunks])


@dataclass(frozen=True)
class Mean:
    """Mean of N values and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """From at least two values [N]."""
        return cls(float(values.mean()), float(values.std() / len(values) ** 0.5))


def distances(
    flow: Flow,
    generated: Mapping[str, Tensor],
    statistics: Mapping[str, Statistics],
    real: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, float]:
    """The figures of generated samples against real ones, by metric.

    Args:
        generated: by feature, [N, D].
        statistics: of the real features.
        real: the real features [M, D], for the figures that compare samples with samples.

    Raises:
        ConfigError: the features are too few or not finite.
    """
    found = {}
    for metric, feature in DISTANCES.get(flow.output, {}).items():
        if feature not in generated or feature not in statistics:
            continue
        prefix = "" if feature == INCEPTION else f"{feature}_"
        try:
            found[metric] = frechet_distance(Statistics.of(generated[feature]), statistics[feature])
            if feature in real:
                found[f"{prefix}kid"] = kernel_distance(generated[feature], real[feature])
                if (shares := precision_recall(generated[feature], real[feature])) is not None:
                    found |= dict(zip((f"{prefix}precision", f"{prefix}recall"), shares, strict=True))
        except ValueError as error:
            raise ConfigError(f"flows: {flow}: {feature}: {error}; look at the samples") from error
    return found


def clip_score(flow: Flow, generated: Mapping[str, Tensor], pairs: Mapping[str, Tensor]) -> Mean | None:
    """The mean CLIP score between outputs and what they were made from; None if CLIP cannot embed one of the two."""
    context = generated.get(CONTEXT, pairs.get(f"{flow.context}/{CLIP}"))
    return None if context is None or CLIP not in generated else Mean.of(clip_scores(generated[CLIP], context))
