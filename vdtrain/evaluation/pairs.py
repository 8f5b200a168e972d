"""The pairs that an evaluation is of: the first in the stream's order under its seed, cropped at the centre."""

from __future__ import annotations

import inspect
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdtrain.compose import ConfigError
from vdtrain.data.batch import BatchStream
from vdtrain.data.manifest import ManifestError
from vdtrain.data.stream import StreamError
from vdtrain.evaluation.parts import Part
from vdtrain.evaluation_config import EvaluateConfig
from vdtrain.instantiate import find_target, instantiate
from vdtrain.training.phase_stream import data_problem

# What `data.stream` says for training and means otherwise here, where a stream takes it: every picture once, as it is.
ASKED = {"random_crop": False, "min_side": 1, "weights": None, "latents": None, "prefetch": 0}


class Pairs:
    """Pairs by their positions, from the set's own stream (`vdtrain.data.batch.BatchStream`).

    Raises:
        ConfigError: no manifest, a stream that cannot be built, or fewer pairs than are asked for.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        target, _ = find_target(config.data.stream, "data.stream")
        parameters = inspect.signature(target).parameters
        self._asked = {name: value for name, value in ASKED.items() if name in parameters}
        stream = self._open(0)
        self.identity: str = getattr(stream, "identity", "")
        count = len(stream) if isinstance(stream, Sized) else None
        stream.close()
        if count is not None and count < config.samples:
            raise ConfigError(
                f"samples={config.samples}: data.manifest={config.data.manifest} has {count} pairs; "
                f"set samples={count}, or index more shards"
            )

    def read(self, part: Part) -> dict[str, Any]:
        """The samples of a part by modality, in the order of their positions.

        Raises:
            ConfigError: they cannot be read.
        """
        stream = self._open(part.number)
        try:
            batch = next(iter(stream))
        except (StreamError, ManifestError, OSError) as error:
            raise ConfigError(data_problem(error, self.config.data.manifest)) from error
        finally:
            stream.close()
        order = torch.argsort(batch.positions)
        order = order[batch.positions[order] < part.stop]
        return {modality: _rows(samples, order) for modality, samples in batch.samples.items()}

    def _open(self, number: int) -> BatchStream:
        """The stream at the beginning of a part."""
        config = self.config
        try:
            stream: BatchStream = instantiate(
                {**config.data.stream, **self._asked},
                "data.stream",
                manifest=Path(config.data.manifest),
                seed=config.seed,
                resolution=config.resolution,
                global_batch_size=config.part_samples,
                rank=0,
                world_size=1,
                start=number * config.part_samples,
                workers=config.loader_workers,
            )
        except (ManifestError, StreamError, OSError) as error:
            raise ConfigError(data_problem(error, config.data.manifest)) from error
        return stream


def _rows(samples: Any, order: Tensor) -> Any:
    return samples[order] if isinstance(samples, Tensor) else [samples[row] for row in order.tolist()]
