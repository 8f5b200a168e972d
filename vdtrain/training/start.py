"""Where a stage starts: its own latest checkpoint, else `stage.init_from`, else random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vdtrain.checkpoint.folder import CHECKPOINTS, CheckpointError, is_checkpoint
from vdtrain.checkpoint.format import Checkpoint
from vdtrain.checkpoint.store import Verification, latest, verify
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
from vdtrain.weights.folder import is_weights_folder, open_weights_folder, weights_folder_model
from vdtrain.weights.layouts import import_first, import_of, is_published


@dataclass(frozen=True)
class Start:
    """A stage's starting point.

    Attributes:
        resume: this run's own checkpoint; optimiser and position continue.
        weights: another run's checkpoint, used only for its weights, or the path of a weights folder.
        position: of `resume`, under the present settings.
        remarks: lines for the user, such as settings that have changed.
    """

    resume: Checkpoint | None = None
    weights: Checkpoint | Path | None = None
    position: TrainState | None = None
    remarks: tuple[str, ...] = ()


def resolve_start(config: TrainConfig, raw_config: DictConfig, check: Verification = Verification.TOGETHER) -> Start:
    """Decide where a stage starts: from its own checkpoint, from `stage.init_from`, or from random weights.

    Args:
        raw_config: the composed configuration, unresolved.
        check: of a checkpoint. SIZES finds mistaken settings before other processes have started.

    Raises:
        ConfigError: the run folder holds another run, or its checkpoints are missing, or `stage.init_from` cannot be
            read.
    """
    folder = Path(config.run_dir) / CHECKPOINTS
    try:
        own = latest(folder, check)
    except OSError as error:
        raise ConfigError(
            f"run_dir={config.run_dir}: {folder} cannot be read ({error.strerror}); check the disk"
        ) from error
    if own is not None:
        news = changes(own.state, raw_config, config.stage, config.run_dir)
        return Start(resume=own, position=position(own.state), remarks=tuple(news))
    # Processes may see different files but must report the same.
    lost = lost_checkpoints(Path(config.run_dir), config.checkpoint.every_steps)
    if check is Verification.TOGETHER:
        lost = distributed.broadcast_json(lost)
    if lost is not None:
        raise ConfigError(lost)
    if config.stage.init_from is None:
        return Start()
    weights = resolve_weights("stage.init_from", config.stage.init_from, check, config.model.name)
    check_schedule(config, weights)
    unfinished = unfinished_stage(weights)
    remarks = () if unfinished is None else (f"stage.init_from={config.stage.init_from}: {unfinished}",)
    return Start(weights=weights, remarks=remarks)


def check_frozen(start: Start, config: TrainConfig) -> list[str]:
    """Compare the contents of the frozen parts' files with those that the weights were trained with.

    Every process calls this together and reads its share of the files.

    Returns:
        One line per file that could not be compared, or that differs from the previous stage's.

    Raises:
        ConfigError: the run itself started with other files.
    """
    origin = start.resume or start.weights
    if not isinstance(origin, Checkpoint):
        return []
    content = origin.state
    now, files = frozen_contents(config.model), frozen_files(config.model)
    recorded: dict[str, str] = dict(content.get(FROZEN, {}))
    lines = []
    if start.resume is not None:
        # Earlier versions recorded no contents. A file that has moved is compared with the one at its old path.
        raw_config = OmegaConf.create(content[CONFIG])
        for setting, path in frozen_files(raw_config.model).items():
            if setting in recorded or setting not in files or files[setting] == path:
                continue
            if Path(path).expanduser().is_file():
                recorded[setting] = sha256(Path(path).expanduser())
            else:
                lines.append(
                    f"{setting}={files[setting]}: was {path}; assumed to be the same file, which cannot be checked"
                )
    for setting in differing(recorded, now):
        other = f"{setting}={files[setting]}: contents differ from those that"
        if start.resume is not None:
            raise ConfigError(
                f"{other} run_dir={config.run_dir} was trained with (SHA-256 {recorded[setting][:12]}, now "
                f"{now[setting][:12]}); restore that file, or give another run_dir"
            )
        lines.append(f"{other} stage.init_from={config.stage.init_from} was trained with")
    return lines


def check_schedule(config: TrainConfig, weights: Checkpoint | Path) -> None:
    """Refuse a noise schedule that differs from the one that the weights were trained with."""
    theirs, ours = asdict(model_of(weights, "stage.init_from").schedule), asdict(config.model.schedule)
    for name, value in ours.items():
        if theirs[name] != value:
            raise ConfigError(
                f"model.schedule.{name}={value}: stage.init_from={config.stage.init_from} was trained with "
                f"{theirs[name]}; set model.schedule.{name}={theirs[name]}, or start from other weights"
            )


def resolve_weights(
    setting: str, value: str, check: Verification = Verification.TOGETHER, model: str | None = None
) -> Checkpoint | Path:
    """The weights folder (its path) or checkpoint that a setting names; of a run folder, its latest checkpoint.

    Args:
        model: name of the model that needs the weights, for the import command in the error.

    Raises:
        ConfigError: neither is there. If the setting names published weights, the error holds their import command.
    """
    path = Path(value).expanduser()
    if is_weights_folder(path):
        return path
    if not is_checkpoint(path) and not (path / CHECKPOINTS).is_dir() and is_published(path):
        raise import_first(setting, value, model)
    return resolve_checkpoint(setting, value, check)


def resolve_checkpoint(setting: str, value: str, check: Verification = Verification.TOGETHER) -> Checkpoint:
    """The checkpoint that a setting names: a checkpoint folder, or the latest of a run folder.

    Args:
        check: what makes a checkpoint of a run folder count as damaged, so that an older one is taken.

    Raises:
        ConfigError: there is no complete checkpoint.
    """
    path = Path(value).expanduser()
    if is_checkpoint(path):
        return verify(path, check)
    remedy = f"train that stage first, or make it with `{import_of(path)}`"
    if not path.exists():
        raise ConfigError(f"{setting}={value}: does not exist; {remedy}")
    found = latest(path / CHECKPOINTS, check)
    if found is None:
        raise ConfigError(f"{setting}={value}: holds no complete checkpoint and no imported weights; {remedy}")
    return found


def open_weights(setting: str, value: str, which: str = "ema") -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The model of the diffuser that a setting names, and its tensors by name; each is read on access.

    Args:
        value: a run folder, a checkpoint folder or a weights folder.
        which: "ema" or "model" of a checkpoint. A weights folder holds one set of weights for both.

    Raises:
        ConfigError: it holds nothing complete.
    """
    try:
        source = resolve_weights(setting, value, Verification.ALONE)
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
    raw_config = OmegaConf.create(source.state["config"])
    model = OmegaConf.merge(OmegaConf.structured(ModelConfig), raw_config.model)
    found = OmegaConf.to_object(model)
    assert isinstance(found, ModelConfig)
    return found


def unfinished_stage(weights: Checkpoint | Path) -> str | None:
    """A line about starting weights whose own stage is not complete; None if it is."""
    if isinstance(weights, Path):
        return None
    content = weights.state
    stage, state = trained_stage(content), TrainState.from_dict(content[STATE])
    steps = stage_steps(stage)
    if state.completes(steps):
        return None
    total = sum(steps)
    return f"{stage.name} stopped there at step {state.step} of {total}; finish it first, or continue from this"
