"""Images mirrored at random, `data.flip`: a function of seed and position, so that a resumed run mirrors the same."""

from __future__ import annotations

import re

import numpy as np
import torch
from numpy.typing import NDArray

from vdtrain.data.batch import Batch
from vdtrain.data.latents import MODALITY
from vdtrain.data.order import uniform
from vdtrain.errors import ConfigError
from vdtrain.seeds import seed_of

# Words that a mirrored image would belie: left, LEFT, left-hand, rightmost, leftwards, but not bright or leftover.
SIDES = re.compile(
    r"(?<![^\W\d_])(top|bottom|upper|lower)?(left|right)(s|most|wards?|y|ies|hand\w*|side\w*|facing)?(?![^\W\d_])",
    re.IGNORECASE,
)


def names_a_side(caption: str) -> bool:
    """Whether a caption names left or right."""
    return SIDES.search(caption) is not None


class Mirror:
    """Mirrors each image of a batch, in place, with a chance of one half; not if a caption names left or right.

    A position of the stream is one sample in one epoch.

    Args:
        seed: of the phase's stream.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed_of(seed, "flip")

    def __call__(self, batch: Batch) -> Batch:
        """The batch, whose images are a tensor [b, ..., height, width].

        Raises:
            ConfigError: they are not.
        """
        images = batch.samples.get(MODALITY)
        if images is None and MODALITY in batch.rows:
            return batch
        if not isinstance(images, torch.Tensor) or images.ndim < 3:
            raise ConfigError("data.flip=true: data.stream yields no images as a tensor; leave it out")
        chosen = uniform(self._seed, batch.positions.numpy(), 1)[:, 0] < 0.5
        for name, texts in batch.samples.items():
            if isinstance(texts, list):
                free = np.array([not (isinstance(text, str) and names_a_side(text)) for text in texts], dtype=bool)
                chosen[_rows(batch, name)] &= free
        chosen = chosen[_rows(batch, MODALITY)]
        rows = torch.from_numpy(np.flatnonzero(chosen))
        images[rows] = images[rows].flip(-1)
        return batch


def _rows(batch: Batch, modality: str) -> slice | NDArray[np.int64]:
    return batch.rows[modality].numpy() if modality in batch.rows else slice(None)
