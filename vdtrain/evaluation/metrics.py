"""Which figures there are for which modality, and how they follow from features.

A *feature* is what one network makes of samples of one modality: "clip" of pictures and of captions, in one space, and
"inception" of pictures. A modality that is not in these tables gets no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdtrain.compose import ConfigError
from vdtrain.evaluation.clip_score import ClipJudge, clip_scores
from vdtrain.evaluation.frechet import Statistics, frechet_distance
from vdtrain.evaluation.inception import InceptionFeatures
from vdtrain.flows import Flow

CLIP, INCEPTION = "clip", "inception"
# Fréchet distances of an output modality: figure -> the feature that it is the distance of.
DISTANCES: Mapping[str, Mapping[str, str]] = {"image": {"fid": INCEPTION, "clip_distance": CLIP}}
# Modalities that the judge has an embedding of.
JUDGED = {"image", "text"}
# Pictures that go through a network together.
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
    found: dict[tuple[str, str], Network] = {("image", CLIP): judge.pictures, ("text", CLIP): judge.captions}
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
