"""What is evaluated: a checkpoint, by the bytes of its own record, and the flows that it has layers for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vdtrain.compose import ConfigError
from vdtrain.config import ModelConfig
from vdtrain.files import FileRecord
from vdtrain.flows import Flow
from vdtrain.models.diffuser import layer_group
from vdtrain.training.checkpoint_folder import INDEX_FILE, CheckpointError
from vdtrain.training.checkpoints import read_weights
from vdtrain.training.curriculum import model_config, resolve_weights
from vdtrain.weights.folder import INDEX_FILE as WEIGHTS_FILE
from vdtrain.weights.folder import is_weights_folder, open_weights_folder, weights_folder_model


@dataclass(frozen=True)
class Subject:
    """A checkpoint.

    Attributes:
        path: of its folder.
        sha256: of its record, which holds the checksums of all its files.
        weights: "ema" or "model".
    """

    path: Path
    sha256: str
    weights: str
    model: ModelConfig
    groups: frozenset[str]

    @classmethod
    def find(cls, checkpoint: str, weights: str) -> Subject:
        """By a run folder, whose latest checkpoint it is, a checkpoint folder or a weights folder; nothing is loaded.

        Raises:
            ConfigError: there is none.
        """
        folder = resolve_weights("checkpoint", checkpoint, thorough=False)
        try:
            if is_weights_folder(folder):
                model = weights_folder_model(folder)
                tensors: Mapping[str, Tensor] = open_weights_folder(folder, hashed=False)
            else:
                model, tensors = model_config(folder), read_weights(folder, weights, verify=False)
        except CheckpointError as error:
            raise ConfigError(f"checkpoint={checkpoint}: {error}") from error
        record = folder / (WEIGHTS_FILE if is_weights_folder(folder) else INDEX_FILE)
        groups = frozenset(layer_group(name) for name in tensors)
        return cls(folder, FileRecord.of(record).sha256, weights, model, groups)

    def flows(self, names: list[str]) -> list[Flow]:
        """Flows by name.

        Raises:
            ConfigError: none, one named twice, or one that there are no layers for.
        """
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"flows={names}: name at least one flow, and each once, e.g. [text-to-image]")
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
        """For metrics.json."""
        return {"path": str(self.path), "sha256": self.sha256, "weights": self.weights, "model": self.model.name}
