"""Where a stage starts: at its own latest checkpoint, else at what `stage.init_from` names, else at random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vdtrain.compose import ConfigError
from vdtrain.config import ModelConfig, TrainConfig
from vdtrain.models.layer_plan import make_plan
from vdtrain.training.checkpoints import CheckpointStore, is_checkpoint, read_trainer_state, read_weights
from vdtrain.validation import raise_unless_found
from vdtrain.weights.stable_diffusion_v1 import read_stable_diffusion

CHECKPOINTS = "checkpoints"
WEIGHTS_FILES = (".ckpt", ".safetensors")
# What a run may not change when it is taken up again: the meaning of its weights and of its position.
FIXED_SETTINGS = ("seed", "stage.flows", "stage.global_batch_size", "model.diffuser", "model.modalities")


@dataclass(frozen=True)
class Start:
    """A stage's starting point.

    Attributes:
        resume: this run's own checkpoint, continued with optimiser and position.
        weights: another run's checkpoint, of which only the weights are taken, or a file of published weights.
    """

    resume: Path | None = None
    weights: Path | None = None


def find_start(config: TrainConfig, document: DictConfig) -> Start:
    """Look for the stage's starting point on disk.

    Args:
        document: the composed configuration, unresolved.

    Raises:
        ConfigError: the run folder holds another run, or `stage.init_from` names nothing that can be read.
    """
    own = CheckpointStore(Path(config.run_dir) / CHECKPOINTS, keep=config.checkpoint.keep).latest_complete()
    if own is not None:
        _check_same_run(read_trainer_state(own)["config"], document, config.run_dir)
        return Start(resume=own)
    if config.stage.init_from is None:
        return Start()
    if Path(config.stage.init_from).suffix in WEIGHTS_FILES:
        raise_unless_found("stage.init_from", config.stage.init_from)
        return Start(weights=Path(config.stage.init_from))
    return Start(weights=resolve_checkpoint("stage.init_from", config.stage.init_from))


def resolve_checkpoint(setting: str, value: str) -> Path:
    """The checkpoint that a setting names: a checkpoint folder, or a run folder, of which the latest is taken.

    Raises:
        ConfigError: there is no complete checkpoint.
    """
    path = Path(value)
    if is_checkpoint(path):
        return path
    if not path.exists():
        raise ConfigError(f"{setting}={value}: does not exist; train that stage first, or give another checkpoint")
    latest = CheckpointStore(path / CHECKPOINTS, keep=1).latest_complete()
    if latest is None:
        raise ConfigError(f"{setting}={value}: holds no complete checkpoint; let that stage finish, or give another")
    return latest


def initial_weights(start: Start, model: ModelConfig) -> dict[str, Tensor]:
    """The weights by name that a new stage starts from; empty where it resumes or starts at random.

    Raises:
        ConfigError: published weights that are not what this model starts from.
    """
    if start.weights is None:
        return {}
    if start.weights.is_dir():
        return read_weights(start.weights, "model")
    return read_stable_diffusion(start.weights, make_plan(model.diffuser), model.base_modality, list(model.modalities))


def run_document(document: DictConfig) -> dict[str, Any]:
    """The configuration as a checkpoint keeps it: interpolations unresolved, so that it can move between machines."""
    container = OmegaConf.to_container(document, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def model_config(checkpoint: Path) -> ModelConfig:
    """The model that a checkpoint was trained with."""
    document = OmegaConf.create(read_trainer_state(checkpoint)["config"])
    model = OmegaConf.merge(OmegaConf.structured(ModelConfig), document.model)
    found = OmegaConf.to_object(model)
    assert isinstance(found, ModelConfig)
    return found


def _check_same_run(before: dict[str, Any], now: DictConfig, run_dir: str) -> None:
    earlier = OmegaConf.create(before)
    for setting in FIXED_SETTINGS:
        old, new = OmegaConf.select(earlier, setting), OmegaConf.select(now, setting)
        if old != new:
            raise ConfigError(
                f"run_dir={run_dir}: holds a run with another {setting} ({old}, now {new}); give another run_dir"
            )
