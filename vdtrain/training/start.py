"""Where a stage starts: at its own latest checkpoint, else at what `stage.init_from` names, else at random weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vdtrain.checkpoint.folder import CHECKPOINTS, summary
from vdtrain.checkpoint.store import (
    CheckpointError,
    CheckpointStore,
    is_checkpoint,
    read_trainer_state,
    read_weights,
    weight_names,
)
from vdtrain.config.compose import ConfigError
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.config.validation import gradient_scales, stage_flows
from vdtrain.engine.deepspeed import EngineSettings
from vdtrain.flows import active_groups
from vdtrain.models.activation_checkpointing import recompute_activations
from vdtrain.models.context_layers import use_kernel
from vdtrain.models.diffuser import Diffuser, layer_group
from vdtrain.run import distributed
from vdtrain.run.records import lost_checkpoints
from vdtrain.training.continuation import (
    CONFIG,
    FROZEN,
    STATE,
    changes,
    differing,
    frozen_contents,
    frozen_files,
    position,
    sha256,
    stage_steps,
    trained_stage,
)
from vdtrain.training.state import TrainState
from vdtrain.weights.catalogue import import_first, import_of, is_published
from vdtrain.weights.folder import is_weights_folder, open_weights_folder, weights_folder_model
from vdtrain.weights.tensor_files import LazyTensors


def starting_diffuser(config: TrainConfig, start: Start) -> Diffuser:
    """The diffuser with the weights that a new stage starts from, on the CPU.

    Beside the layers that the stage trains it has those that an earlier stage trained: they are carried along to the
    stages after this one. Where the stage resumes, its weights come with the checkpoint, afterwards.
    """
    weights = initial_weights(start, config.model)
    names = weight_names(start.resume) if start.resume is not None else weights
    diffuser = Diffuser(config.model, layer_groups(config, names), seed=config.seed)
    load_weights(diffuser, weights)
    use_kernel(diffuser, config.hardware.attention)
    recompute_activations(diffuser, config.hardware.activation_checkpointing)
    return diffuser


def layer_groups(config: TrainConfig, names: Iterable[str]) -> set[str]:
    """The groups that a stage trains, and those that the weights of these names bring along."""
    return {*active_groups(stage_flows(config)), *map(layer_group, names)}


def load_weights(diffuser: Diffuser, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by name. Every layer group comes whole or not at all; one that does not keeps its random start.

    Raises:
        ConfigError: see `check_weights`.
    """
    check_weights(diffuser, weights)
    own = diffuser.state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def check_weights(diffuser: Diffuser, weights: Mapping[str, Tensor]) -> None:
    """Compare names and shapes, which reads no weights.

    Raises:
        ConfigError: a name or a shape that the model does not have, or a group of which a part is missing.
    """
    own = diffuser.state_dict()
    given = {layer_group(name) for name in weights}
    expected = {name for name in own if layer_group(name) in given}
    for problem, names in (("unknown", weights.keys() - own.keys()), ("missing", expected - weights.keys())):
        if names:
            raise ConfigError(
                f"stage.init_from: {len(names)} {problem} weights, e.g. {min(names)}; is it the same model?"
            )
    for name, tensor in LazyTensors.of(weights).outline().items():
        if own[name].shape != tensor.shape:
            raise ConfigError(
                f"stage.init_from: {name} is {list(tensor.shape)}, here {list(own[name].shape)}; is it the same model?"
            )


def engine_settings(config: TrainConfig) -> EngineSettings:
    """The engine's share of a training configuration."""
    optimizer, hardware = config.optimizer, config.hardware
    first, second = optimizer.betas
    return EngineSettings(
        zero_stage=hardware.zero_stage,
        precision=hardware.precision,
        gradient_clip=optimizer.gradient_clip,
        betas=(first, second),
        epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        gradient_scales=gradient_scales(config),
        gradient_scale_mode=config.stage.gradient_scale_mode,
    )


@dataclass(frozen=True)
class Start:
    """A stage's starting point.

    Attributes:
        resume: this run's own checkpoint, continued with optimiser and position.
        weights: another run's checkpoint, of which only the weights are taken, or a weights folder.
        position: of `resume`, under the present settings.
        remarks: a line on everything that a person should know: settings that are not what they were, and so on.
    """

    resume: Path | None = None
    weights: Path | None = None
    position: TrainState | None = None
    remarks: tuple[str, ...] = ()


def find_start(config: TrainConfig, document: DictConfig, verify_checksums: bool = True) -> Start:
    """Look for the stage's starting point on disk.

    Args:
        document: the composed configuration, unresolved.
        verify_checksums: check every byte of the run's own checkpoint, each process its share. False compares the
            sizes of its files, and finds mistaken settings before other processes have started.

    Raises:
        ConfigError: the run folder holds another run, or had checkpoints that are not to be seen, or `stage.init_from`
            names nothing that can be read.
    """
    folder = Path(config.run_dir) / CHECKPOINTS
    try:
        own = CheckpointStore(folder, keep=config.checkpoint.keep).latest_complete(verify_checksums)
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir}: {folder} cannot be read ({error.strerror}); mend that") from error
    if own is not None:
        content = read_trainer_state(own)
        news = changes(content, document, config.stage, config.run_dir)
        return Start(resume=own, position=position(content), remarks=tuple(news))
    # All processes are to say the same, and may not see the same.
    lost = lost_checkpoints(Path(config.run_dir), config.checkpoint.every_steps)
    if verify_checksums:
        lost = distributed.broadcast_json(lost)
    if lost is not None:
        raise ConfigError(lost)
    if config.stage.init_from is None:
        return Start()
    weights = resolve_weights("stage.init_from", config.stage.init_from, verify_checksums, config.model.name)
    check_schedule(config, weights)
    unfinished = unfinished_stage(weights)
    remarks = () if unfinished is None else (f"stage.init_from={config.stage.init_from}: {unfinished}",)
    return Start(weights=weights, remarks=remarks)


def check_frozen(start: Start, config: TrainConfig) -> list[str]:
    """Compare the files of the frozen parts with those that the weights were trained with, by their contents.

    Every process calls this together: all files are read, by each its share.

    Returns:
        A line on everything that could not be compared, or that is another one than in the stage before.

    Raises:
        ConfigError: the run was begun with other ones.
    """
    origin = start.resume or start.weights
    if origin is None or is_weights_folder(origin):
        return []
    content = read_trainer_state(origin)
    now, files = frozen_contents(config.model), frozen_files(config.model)
    recorded: dict[str, str] = dict(content.get(FROZEN, {}))
    lines = []
    if start.resume is not None:
        # Of files that an earlier version kept no record of, those that lie elsewhere now are compared with the old.
        document = OmegaConf.create(content[CONFIG])
        for setting, path in frozen_files(document.model).items():
            if setting in recorded or setting not in files or files[setting] == path:
                continue
            if Path(path).expanduser().is_file():
                recorded[setting] = sha256(Path(path).expanduser())
            else:
                lines.append(
                    f"{setting}={files[setting]}: {path} until here; taken for the same, which cannot be checked"
                )
    for setting in differing(recorded, now):
        other = f"{setting}={files[setting]}: other contents than"
        if start.resume is not None:
            raise ConfigError(
                f"{other} run_dir={config.run_dir} was trained with (SHA-256 {recorded[setting][:12]}, now "
                f"{now[setting][:12]}); bring that file back, or give another run_dir"
            )
        lines.append(f"{other} stage.init_from={config.stage.init_from} was trained with")
    return lines


def check_schedule(config: TrainConfig, weights: Path) -> None:
    """Refuse another noise schedule than that of the weights, which have learnt to remove noise by theirs.

    Raises:
        ConfigError: it is another one.
    """
    theirs, ours = asdict(_model_of(weights, "stage.init_from").schedule), asdict(config.model.schedule)
    for name, value in ours.items():
        if theirs[name] != value:
            raise ConfigError(
                f"model.schedule.{name}={value}: {theirs[name]} in stage.init_from={config.stage.init_from}, whose "
                f"weights were trained with that; set model.schedule.{name}={theirs[name]}, or start from other weights"
            )


def resolve_weights(setting: str, value: str, verify_checksums: bool = True, model: str | None = None) -> Path:
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
    return resolve_checkpoint(setting, value, verify_checksums)


def resolve_checkpoint(setting: str, value: str, verify_checksums: bool = True) -> Path:
    """The checkpoint that a setting names: a checkpoint folder, or a run folder, of which the latest is taken.

    Args:
        verify_checksums: pass over damaged ones, for which all files are read; see `find_start`.

    Raises:
        ConfigError: there is no complete checkpoint.
    """
    path = Path(value).expanduser()
    if is_checkpoint(path):
        return path
    remedy = f"train that stage first, or make it with `{import_of(path)}`"
    if not path.exists():
        raise ConfigError(f"{setting}={value}: does not exist; {remedy}")
    latest = CheckpointStore(path / CHECKPOINTS, keep=1).latest_complete(verify_checksums)
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


def initial_weights(start: Start, model: ModelConfig, verify_checksums: bool = True) -> Mapping[str, Tensor]:
    """The weights by name that a new stage starts from; empty where it resumes or starts at random.

    Args:
        verify_checksums: check every byte, each process its share; False goes by the files' sizes.

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
        return open_weights_folder(start.weights, "stage.init_from", hashed=verify_checksums)
    if verify_checksums:
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
    stage, state = trained_stage(content), TrainState.from_dict(content[STATE])
    steps = stage_steps(stage)
    if state.completes(steps):
        return None
    total = sum(steps)
    return f"{stage.name} stopped at step {state.step} of {total} there; train it to its end first, or go on from this"
