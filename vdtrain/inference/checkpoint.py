"""The checkpoint that a command samples from, as its records describe it; no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vdtrain.checkpoint.folder import INDEX_FILE, CheckpointError
from vdtrain.checkpoint.store import Verification
from vdtrain.config.command_schema import SamplerConfig
from vdtrain.config.instantiate import check_parts, import_parts
from vdtrain.config.schema import ModelConfig
from vdtrain.errors import ConfigError
from vdtrain.flows import Flow, flow_of
from vdtrain.models.diffuser import layer_group
from vdtrain.training.start import check_state, model_of, resolve_weights
from vdtrain.weights.folder import INDEX_FILE as WEIGHTS_FILE
from vdtrain.weights.folder import located, open_weights_folder
from vdtrain.weights.tensor_files import LazyTensors


@dataclass(frozen=True)
class Described:
    """A checkpoint or a weights folder.

    Attributes:
        record: the file with its names, sizes and checksums.
        state: the trainer's state of a checkpoint; empty for a weights folder.
    """

    record: Path
    model: ModelConfig
    tensors: LazyTensors
    state: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.record.parent

    @cached_property
    def groups(self) -> set[str]:
        """Its layer groups."""
        return {layer_group(name) for name in self.tensors}

    @property
    def parameters(self) -> int:
        return sum(entry.shape.numel() for entry in self.tensors.entries.values())

    def flow(self, name: str, setting: str = "flow") -> Flow:
        """A flow by name; see `flow_of`."""
        return flow_of(setting, name, self.groups, self.model.modalities)


def describe(config: SamplerConfig) -> Described:
    """What `checkpoint` names, by its records and the sizes of its files.

    Raises:
        ConfigError: it holds nothing complete, or names a class that is not trusted.
    """
    if not located(config.checkpoint).exists():
        raise ConfigError(
            f"checkpoint={config.checkpoint}: does not exist; give a run, checkpoint or weights folder as the first "
            "plain argument, or as checkpoint="
        )
    try:
        source = resolve_weights("checkpoint", config.checkpoint, Verification.SIZES)
        if isinstance(source, Path):
            tensors, record, state = open_weights_folder(source, hashed=False), source / WEIGHTS_FILE, {}
        else:
            check_state(source)
            tensors, record = source.unchecked_weights(config.weights), source.path / INDEX_FILE
            state = dict(source.state)
        model = model_of(source, "checkpoint")
    except CheckpointError as error:
        raise ConfigError(f"checkpoint={config.checkpoint}: {error}") from error
    check_parts(model, config.trust, f"checkpoint={config.checkpoint}")
    # They register how the files of their modalities are read, and their figures.
    import_parts(model)
    return Described(record, model, tensors, state)
