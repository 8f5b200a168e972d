"""Batches without data, for benchmarks: random images or moments, and captions as long as those of the web."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import numpy as np
import torch

from vdtrain.data.batch import Batch, BatchMemory
from vdtrain.data.latents import MODALITY

# Words of every vocabulary, that of the miniature included.
TEXT = "a red circle on white with the blue square and the green star on black triangle"


# The median caption has eight words and one in a hundred more than forty, which fill the 77 ids of a text encoder.
MEDIAN_WORDS, SPREAD, MOST_WORDS = 8.0, 0.7, 70


# Made at the start, so that a step never waits for random numbers.
BATCHES = 2


class SyntheticStream:
    """The same batches again and again; a `BatchStream`.

    Args:
        rows: pairs of this process in a batch.
        resolution: R, side of the images [rows, 3, R, R], uint8.
        moments: shape of one image's cached moments, which are float16 like those on disk; None delivers none.
    """

    def __init__(
        self, rows: int, resolution: int, *, seed: int = 0, rank: int = 0, moments: tuple[int, ...] | None = None
    ) -> None:
        random = np.random.default_rng([seed, rank])
        generator = torch.Generator().manual_seed(seed)
        memory, words = BatchMemory(), TEXT.split()
        positions = torch.arange(rank * rows, (rank + 1) * rows)
        self._batches = []
        for _ in range(BATCHES):
            images = memory.take((rows, 3, resolution, resolution), torch.uint8)
            images.random_(0, 256, generator=generator)
            lengths = np.clip(random.lognormal(np.log(MEDIAN_WORDS), SPREAD, rows), 1, MOST_WORDS).astype(int)
            captions = [" ".join(random.choice(words, length)) for length in lengths]
            cached = {}
            if moments is not None:
                cached[MODALITY] = memory.take((rows, *moments), torch.float16)
                cached[MODALITY].copy_(torch.randn(cached[MODALITY].shape, generator=generator))
            self._batches.append(Batch({"image": images, "text": captions}, positions, cached))

    def __iter__(self) -> Iterator[Batch]:
        return cycle(self._batches)

    def close(self) -> None:
        """Do nothing: no thread and no file is open."""
