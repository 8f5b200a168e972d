"""Where a stage starts: at its own latest checkpoint, else at what `stage.init_from` names, else at random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vdtrain.checkpoint.folder import CHECKPOINTS, CheckpointError, is_checkpoint
from vdtrain.checkpoint.format import Checkpoint
from vdtrain.checkpoint.store import latest, verify
from vdtrain.config.compose import ConfigError
from vdtrain.config.schema import ModelConfig, TrainConfig
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


@dataclass(frozen=True)
class Start:
    """A stage's starting point.

    Attributes:
        resume: this run's own checkpoint, continued with optimiser and position.
        weights: another run's checkpoint, of which only the weights are taken, or a weights folder.
        position: of `resume`, under the present settings.
        remarks: a line on everything that a person should know: settings that are not what they were, and so on.
    """

    resume: Checkpoint | None = None
    weights: Checkpoint | Path | None = None
    position: TrainState | None = None
    remarks: tuple[str, ...] = ()


def resolve_start(config: TrainConfig, document: DictConfig, verify_checksums: bool = True) -> Start:
    """Decide where a stage starts: from its own checkpoint, from `stage.init_from`, or from random weights.

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
        own = latest(folder, verify_checksums)
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir}: {folder} cannot be read ({error.strerror}); mend that") from error
    if own is not None:
        news = changes(own.state, document, config.stage, config.run_dir)
        return Start(resume=own, position=position(own.state), remarks=tuple(news))
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
    if not isinstance(origin, Checkpoint):
        return []
    content = origin.state
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


def check_schedule(config: TrainConfig, weights: Checkpoint | Path) -> None:
    """Refuse another noise schedule than that of the weights, which have learnt to remove noise by theirs.

    Raises:
        ConfigError: it is another one.
    """
    theirs, ours = asdict(model_of(weights, "stage.init_from").schedule), asdict(config.model.schedule)
    for name, value in ours.items():
        if theirs[name] != value:
            raise ConfigError(
                f"model.schedule.{name}={value}: {theirs[name]} in stage.init_from={config.stage.init_from}, whose "
                f"weights were trained with that; set model.schedule.{name}={theirs[name]}, or start from other weights"
            )


def resolve_weights(
    setting: str, value: str, verify_checksums: bool = True, model: str | None = None
) -> Checkpoint | Path:
    """What a setting names: a weights folder, as its path, or a checkpoint: itself, or the latest of a run folder.

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


def resolve_checkpoint(setting: str, value: str, verify_checksums: bool = True) -> Checkpoint:
    """The checkpoint that a setting names: a checkpoint folder, or a run folder, of which the latest is taken.

    Args:
        verify_checksums: pass over damaged ones, for which all files are read; see `find_start`.

    Raises:
        ConfigError: there is no complete checkpoint.
    """
    path = Path(value).expanduser()
    if is_checkpoint(path):
        return verify(path) if verify_checksums else Checkpoint.open(path)
    remedy = f"train that stage first, or make it with `{import_of(path)}`"
    if not path.exists():
        raise ConfigError(f"{setting}={value}: does not exist; {remedy}")
    found = latest(path / CHECKPOINTS, verify_checksums)
    if found is None:
        raise ConfigError(f"{setting}={value}: holds no complete checkpoint and no imported weights; {remedy}")
    return found


def open_weights(setting: str, value: str, which: str = "ema") -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The diffuser that a setting names: its model, and its tensors by our names, each read on access.

    Args:
        value: a run folder, a checkpoint folder or a weights folder.
        which: "ema" or "model", of a checkpoint. A weights folder holds one set of weights, which serves as both.

    Raises:
        ConfigError: there is nothing complete to read.
    """
    try:
        source = resolve_weights(setting, value)
        return model_of(source, setting), weights_of(source, setting, which)
    except CheckpointError as error:
        raise ConfigError(f"{setting}={value}: {error}") from error


def weights_of(source: Checkpoint | Path, setting: str, which: str) -> Mapping[str, Tensor]:
    """The weights of a checkpoint or of a weights folder, by name; each is read on access."""
    return source.weights(which) if isinstance(source, Checkpoint) else open_weights_folder(source, setting)


def model_of(source: Checkpoint | Path, setting: str) -> ModelConfig:
    """The model of a checkpoint or of a weights folder."""
    if isinstance(source, Path):
        return weights_folder_model(source, setting)
    document = OmegaConf.create(source.state["config"])
    model = OmegaConf.merge(OmegaConf.structured(ModelConfig), document.model)
    found = OmegaConf.to_object(model)
    assert isinstance(found, ModelConfig)
    return found


def unfinished_stage(weights: Checkpoint | Path) -> str | None:
    """What a person should know of weights that a stage starts from and whose own stage did not come to its end."""
    if isinstance(weights, Path):
        return None
    content = weights.state
    stage, state = trained_stage(content), TrainState.from_dict(content[STATE])
    steps = stage_steps(stage)
    if state.completes(steps):
        return None
    total = sum(steps)
    return f"{stage.name} stopped at step {state.step} of {total} there; train it to its end first, or go on from this"
