"""Figures of modalities beyond images and captions; the module of such a modality registers its own by name.

An evaluation imports that module because a checkpoint's model names its classes, and only if `trust` admits it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

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
