"""Where a stage starts: at its own latest checkpoint, else at what `stage.init_from` names, else at random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vdtrain.compose import ConfigError
from vdtrain.config import ModelConfig, StageConfig, TrainConfig
from vdtrain.training.checkpoint_folder import CHECKPOINTS, summary
from vdtrain.training.checkpoints import (
    CheckpointError,
    CheckpointStore,
    is_checkpoint,
    read_trainer_state,
    read_weights,
)
from vdtrain.validation import phase_steps
from vdtrain.weights.advice import import_first, import_of, is_published
from vdtrain.weights.folder import is_weights_folder, open_weights_folder, weights_folder_model

# What a run may not change when it is taken up again: the meaning of its weights and of its position.
FIXED_SETTINGS = ("seed", "stage.flows", "stage.global_batch_size", "model.diffuser", "model.modalities")


@dataclass(frozen=True)
class Start:
    """A stage's starting point.

    Attributes:
        resume: this run's own checkpoint, continued with optimiser and position.
        weights: another run's checkpoint, of which only the weights are taken, or a weights folder.
    """

    resume: Path | None = None
    weights: Path | None = None


def find_start(config: TrainConfig, document: DictConfig, thorough: bool = True) -> Start:
    """Look for the stage's starting point on disk.

    Args:
        document: the composed configuration, unresolved.
        thorough: check every byte of the run's own checkpoint, each process its share; False goes by its files' sizes,
            and tells of mistaken settings before there are other processes to talk to.

    Raises:
        ConfigError: the run folder holds another run, or `stage.init_from` names nothing that can be read.
    """
    own = CheckpointStore(Path(config.run_dir) / CHECKPOINTS, keep=config.checkpoint.keep).latest_complete(thorough)
    if own is not None:
        _check_same_run(read_trainer_state(own)["config"], document, config.run_dir)
        return Start(resume=own)
    if config.stage.init_from is None:
        return Start()
    return Start(weights=resolve_weights("stage.init_from", config.stage.init_from, thorough, config.model.name))


def resolve_weights(setting: str, value: str, thorough: bool = True, model: str | None = None) -> Path:
    """The folder that a setting names: a weights folder, a checkpoint folder, or a run folder's latest checkpoint.

    Args:
        model: that wants the weights, by name, for the command that imports published ones.

    Raises:
        ConfigError: there is nothing of these. Where the setting names published weights, it has their command.
    """
    path = Path(value).expanduser()
    if is_weights_folder(path):
        return path
    if not is_checkpoint(path) and not (path / CHECKPOINTS).is_dir() and is_published(path):
        raise import_first(setting, value, model)
    return resolve_checkpoint(setting, value, thorough)


def resolve_checkpoint(setting: str, value: str, thorough: bool = True) -> Path:
    """The checkpoint that a setting names: a checkpoint folder, or a run folder, of which the latest is taken.

    Args:
        thorough: pass over damaged ones, for which all files are read; see `find_start`.

    Raises:
        ConfigError: there is no complete checkpoint.
    """
    path = Path(value).expanduser()
    if is_checkpoint(path):
        return path
    remedy = f"train that stage first, or make it with `{import_of(path)}`"
    if not path.exists():
        raise ConfigError(f"{setting}={value}: does not exist; {remedy}")
    latest = CheckpointStore(path / CHECKPOINTS, keep=1).latest_complete(thorough)
    if latest is None:
        raise ConfigError(f"{setting}={value}: holds no complete checkpoint and no imported weights; {remedy}")
    return latest


def open_weights(setting: str, value: str, which: str = "ema") -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The diffuser that a setting names: its model, and its tensors by our names, each read on access.

    Args:
        value: a run folder, a checkpoint folder or a weights folder.
        which: "ema" or "model", of a checkpoint. A weights folder holds one set of weights, which serves as both.

    Raises:
        ConfigError: there is nothing complete to read.
    """
    folder = resolve_weights(setting, value)
    try:
        return _model_of(folder, setting), _weights_of(folder, setting, which)
    except CheckpointError as error:
        raise ConfigError(f"{setting}={value}: {error}") from error


def initial_weights(start: Start, model: ModelConfig, thorough: bool = True) -> Mapping[str, Tensor]:
    """The weights by name that a new stage starts from; empty where it resumes or starts at random.

    Args:
        thorough: check every byte, each process its share; False goes by the files' sizes.

    Raises:
        ConfigError: they are of a model of other sizes, or a weights folder is damaged.
        CheckpointError: a checkpoint is damaged.
    """
    if start.weights is None:
        return {}
    theirs = _model_of(start.weights, "stage.init_from")
    if theirs.diffuser != model.diffuser:
        raise ConfigError(
            f"stage.init_from={start.weights}: of a model with {theirs.diffuser}, and this one has {model.diffuser}; "
            f"choose model={theirs.name}, or other weights"
        )
    if is_weights_folder(start.weights):
        return open_weights_folder(start.weights, "stage.init_from", hashed=thorough)
    if thorough:
        # Each process checks its share of the files, where reading would check all of them on every process.
        CheckpointStore(start.weights.parent, keep=1).verify(start.weights)
    else:
        summary(start.weights)
    return read_weights(start.weights, verify=False)


def _model_of(folder: Path, setting: str) -> ModelConfig:
    return weights_folder_model(folder, setting) if is_weights_folder(folder) else model_config(folder)


def _weights_of(folder: Path, setting: str, which: str) -> Mapping[str, Tensor]:
    return open_weights_folder(folder, setting) if is_weights_folder(folder) else read_weights(folder, which)


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


def unfinished_stage(weights: Path) -> str | None:
    """What a person should know of weights that a stage starts from and whose own stage did not come to its end."""
    if is_weights_folder(weights):
        return None
    content = read_trainer_state(weights)
    document = OmegaConf.create(content["config"])
    OmegaConf.resolve(document)
    stage = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StageConfig), document.stage))
    assert isinstance(stage, StageConfig)
    step = content["state"]["step"]
    total = sum(phase_steps(TrainConfig(stage=stage), phase) for phase in stage.phases)
    if step >= total:
        return None
    return f"{stage.name} stopped at step {step} of {total} there; train it to its end first, or go on from this"


def _check_same_run(before: dict[str, Any], now: DictConfig, run_dir: str) -> None:
    earlier = OmegaConf.create(before)
    for setting in FIXED_SETTINGS:
        old, new = OmegaConf.select(earlier, setting), OmegaConf.select(now, setting)
        if old != new:
            raise ConfigError(
                f"run_dir={run_dir}: holds a run with another {setting} ({old}, now {new}); give another run_dir"
            )
