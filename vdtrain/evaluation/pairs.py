"""An evaluation's pairs (the first of the stream's order under the seed, cropped at the centre) and its model."""

from __future__ import annotations

import inspect
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdtrain.checkpoint.folder import INDEX_FILE, CheckpointError
from vdtrain.checkpoint.store import Verification
from vdtrain.config.compose import ConfigError
from vdtrain.config.instantiate import find_target, instantiate
from vdtrain.config.schema import EvaluateConfig, ModelConfig
from vdtrain.data.batch import BatchStream
from vdtrain.data.loading import data_problem
from vdtrain.data.manifest import ManifestError
from vdtrain.data.stream import StreamError
from vdtrain.evaluation.parts import Part
from vdtrain.files import FileRecord
from vdtrain.flows import Flow
from vdtrain.models.diffuser import layer_group
from vdtrain.training.start import model_of, resolve_weights
from vdtrain.weights.folder import INDEX_FILE as WEIGHTS_FILE
from vdtrain.weights.folder import open_weights_folder

# Settings of `data.stream` that differ from training, if the stream has them: every image once, unchanged.
OVERRIDES = {"random_crop": False, "min_side": 1, "weights": None, "latents": None, "prefetch": 0}


class Pairs:
    """Pairs by their positions, from the data set's own stream (`vdtrain.data.batch.BatchStream`).

    Raises:
        ConfigError: the manifest is missing, the stream cannot be built, or there are too few pairs.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        target, _ = find_target(config.data.stream, "data.stream")
        parameters = inspect.signature(target).parameters
        self._overrides = {name: value for name, value in OVERRIDES.items() if name in parameters}
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
            ConfigError: the pairs cannot be read.
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
        """The stream, at the start of a part."""
        config = self.config
        try:
            stream: BatchStream = instantiate(
                {**config.data.stream, **self._overrides},
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


@dataclass(frozen=True)
class EvaluatedModel:
    """The model under test.

    Attributes:
        path: the checkpoint or weights folder.
        sha256: checksum of the folder's index, which has the checksums of all its files.
        weights: "ema" or "model".
        groups: layer groups in the folder.
    """

    path: Path
    sha256: str
    weights: str
    model: ModelConfig
    groups: frozenset[str]

    @classmethod
    def find(cls, checkpoint: str, weights: str) -> EvaluatedModel:
        """From a run folder (its latest checkpoint), a checkpoint folder or a weights folder. Nothing is loaded.

        Raises:
            ConfigError: there is no checkpoint.
        """
        try:
            source = resolve_weights("checkpoint", checkpoint, Verification.SIZES)
            if isinstance(source, Path):
                tensors, record = open_weights_folder(source, hashed=False), source / WEIGHTS_FILE
            else:
                tensors, record = source.unchecked_weights(weights), source.path / INDEX_FILE
        except CheckpointError as error:
            raise ConfigError(f"checkpoint={checkpoint}: {error}") from error
        groups = frozenset(layer_group(name) for name in tensors)
        model = model_of(source, "checkpoint")
        return cls(record.parent, FileRecord.of(record).sha256, weights, model, groups)

    def flows(self, names: list[str]) -> list[Flow]:
        """Flows by name.

        Raises:
            ConfigError: there is no name, a name is given twice, or a flow has no layers in the model.
        """
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"flows={names}: name at least one flow, each once, e.g. [text-to-image]")
        flows = []
        for name in names:
            try:
                flow = Flow.parse(name)
            except ValueError as error:
                raise ConfigError(f"flows: {error}") from error
            if absent := [group for group in flow.groups if group not in self.groups]:
                raise ConfigError(f"flows: {name}: {self.path} has no layers {absent[0]}; leave it out")
            flows.append(flow)
        return flows

    def described(self) -> dict[str, Any]:
        """The entry in metrics.json."""
        return {"path": str(self.path), "sha256": self.sha256, "weights": self.weights, "model": self.model.name}
