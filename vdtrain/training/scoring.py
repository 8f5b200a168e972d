"""Scores of a few held-out pairs at each validation: CLIP score, the distance on CLIP's features, and FID if asked for.

They stand on the training run's own axis. So few samples make distances far too large: compare them within a run only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vdtrain.config.command_schema import ClipConfig
from vdtrain.config.schema import TrainConfig
from vdtrain.evaluation.frechet import Statistics
from vdtrain.evaluation.inception import InceptionFeatures
from vdtrain.evaluation.scores import (
    CLIP,
    EMBEDDED,
    INCEPTION,
    ClipScorer,
    Network,
    clip_score,
    distances,
    features_of,
    in_batches,
    networks,
)
from vdtrain.training.samples import Drawn, Inputs

# The CLIP of the model's own contexts.
OWN_CLIP = ClipConfig(architecture=None, weights=None, tokenizer=None)


class Scoring:
    """The pairs to score at one resolution, on every process, and on rank 0 the networks that score.

    Raises:
        ConfigError: the networks cannot be built, or see `Inputs`.
    """

    def __init__(self, config: TrainConfig, resolution: int, device: torch.device, scores: bool) -> None:
        self.inputs, self.resolution, self.device = Inputs.of_pairs(config, resolution), resolution, device
        self._scorer: ClipScorer | None = None
        self._inception: InceptionFeatures | None = None
        if scores:
            self._scorer = ClipScorer(OWN_CLIP, config.model)
            if config.validation.fid_weights is not None:
                self._inception = InceptionFeatures(config.validation.fid_weights)

    def figures(self, drawn: Sequence[Drawn]) -> dict[str, dict[str, float]]:
        """The scores of what every flow made of the pairs, by flow and metric; on rank 0.

        Raises:
            ConfigError: features are not finite.
        """
        assert self._scorer is not None
        found = networks(self._scorer.to(self.device), self._inception and self._inception.to(self.device))
        try:
            pairs = {
                f"{modality}/{feature}": self._features(found, modality, feature, batch)
                for modality, batch in self.inputs.batches.items()
                for feature in self._wanted(modality)
            }
            real = {
                feature: Statistics.of(pairs[f"image/{feature}"])
                for feature in (CLIP, INCEPTION)
                if f"image/{feature}" in pairs
            }
            result: dict[str, dict[str, float]] = {}
            for each in drawn:
                output = each.flow.output
                generated = {
                    feature: self._features(found, output, feature, each.made) for feature in self._wanted(output)
                }
                result[each.flow.name] = distances(each.flow, generated, real)
                if (score := clip_score(each.flow, generated, pairs)) is not None:
                    result[each.flow.name]["clip_score"] = score.mean
            return result
        finally:
            # Between two validations their memory belongs to training.
            self._scorer.cpu()
            if self._inception is not None:
                self._inception.cpu()

    def _wanted(self, modality: str) -> list[str]:
        return sorted(features_of(modality, self._inception is not None)) if modality in EMBEDDED else []

    def _features(
        self, found: dict[tuple[str, str], Network], modality: str, feature: str, samples: Any
    ) -> torch.Tensor:
        return in_batches(found[modality, feature], samples)
