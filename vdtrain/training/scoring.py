"""Scores of a few held-out pairs at each validation: CLIP score, the distance on CLIP's features, and FID if asked for.

They stand on the training run's own axis. So few samples make distances far too large: compare them within a run only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vdtrain.config.command_schema import ClipConfig
from vdtrain.config.schema import TrainConfig
from vdtrain.evaluation.distances import Statistics
from vdtrain.evaluation.inception import InceptionFeatures
from vdtrain.evaluation.scores import (
    CLIP,
    EMBEDDED,
    INCEPTION,
    ClipScorer,
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
                self._inception = InceptionFeatures(config.validation.fid_weights, "validation.fid_weights")

    def figures(self, drawn: Sequence[Drawn]) -> dict[str, dict[str, float]]:
        """The scores of what every flow made of the pairs, by flow and metric; on rank 0.

        Raises:
            ConfigError: features are not finite.
        """
        assert self._scorer is not None
        found = networks(self._scorer.to(self.device), self._inception and self._inception.to(self.device))

        def features(modality: str, batch: Any) -> dict[str, Tensor]:
            wanted = features_of(modality, self._inception is not None) if modality in EMBEDDED else ()
            return {feature: in_batches(found[modality, feature], batch) for feature in sorted(wanted)}

        try:
            own = {modality: features(modality, batch) for modality, batch in self.inputs.batches.items()}
            pairs = {f"{modality}/{name}": each for modality, some in own.items() for name, each in some.items()}
            real = {
                name: Statistics.of(pairs[image]) for name in (CLIP, INCEPTION) if (image := f"image/{name}") in pairs
            }
            result: dict[str, dict[str, float]] = {}
            for each in drawn:
                generated = features(each.flow.output, each.made)
                result[each.flow.name] = distances(each.flow, generated, real)
                if (score := clip_score(each.flow, generated, pairs)) is not None:
                    result[each.flow.name]["clip_score"] = score.mean
            return result
        finally:
            # Between two validations their memory belongs to training.
            self._scorer.cpu()
            if self._inception is not None:
                self._inception.cpu()
