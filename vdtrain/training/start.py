"""Where a stage starts: its own latest checkpoint, else `stage.init_from`, else random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from vdtrain.checkpoint.folder import CHECKPOINTS, CheckpointError, UnreadableError, is_checkpoint
from vdtrain.checkpoint.format import Checkpoint
from vdtrain.checkpoint.store import PATIENCE_SECONDS, Verification, latest, looked, verify
from vdtrain.config.compose import ConfigError
from vdtrain.config.instantiate import check_parts, recorded, recorded_model
from vdtrain.config.schema import LoraConfig, ModelConfig, TrainConfig
from vdtrain.errors import one_line
from vdtrain.models.trained import is_adapter, merged, scale_of
from vdtrain.run import distributed
from vdtrain.tracking.summary import lost_checkpoints
from vdtrain.training.continuation import (
    FROZEN,
    STATE,
    TrainState,
    changes,
    frozen_contents,
    frozen_files,
    position,
    recorded_config,
    sha256,
    stage_steps,
    trained_stage,
)
from vdtrain.weights.folder import is_weights_folder, located, open_weights_folder, weights_folder_model
from vdtrain.weights.published.layouts import import_first, import_of, is_published
from vdtrain.weights.tensor_files import LazyTensors

# What a setting may name.
WEIGHTS, CHECKPOINT, RUN = "weights", "checkpoint", "run"
# How long a start waits for an error of a disk that may pass, at most, and as a share of the watchdog's limit.
START_PATIENCE_SECONDS, PATIENCE_OF_WATCHDOG = 120.0, 0.25


@dataclass(frozen=True)
class Start:
    """A stage's starting point.

    Attributes:
        resume: this run's own checkpoint; optimiser and position continue.
        weights: another run's checkpoint, used only for its weights, or the path of a weights folder.
        position: of `resume`, under the present settings.
        remarks: warnings for the user, such as settings that have changed.
        notes: lines on other settings that have changed.
    """

    resume: Checkpoint | None = None
    weights: Checkpoint | Path | None = None
    position: TrainState | None = None
    remarks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def resolve_start(config: TrainConfig, raw_config: DictConfig, check: Verification = Verification.TOGETHER) -> Start:
    """Decide where a stage starts: from its own checkpoint, from `stage.init_from`, or from random weights.

    Args:
        raw_config: the composed configuration, unresolved.
        check: of a checkpoint. SIZES finds mistaken settings before other processes have started.

    Raises:
        ConfigError: the run folder holds another run, or its checkpoints are missing or all damaged, or
            `stage.init_from` cannot be read.
        CheckpointError: a checkpoint cannot be read, and may be whole. After a check of SIZES also: checkpoints are
            missing or damaged, which another process may see differently.
    """
    run_dir, patience = Path(config.run_dir), _patience(config)
    damage = ""
    try:
        own = latest(run_dir / CHECKPOINTS, check, patience)
        if own is not None:
            check_state(own)
            warned, noted = changes(own.state, raw_config, config.stage, config.run_dir)
            return Start(resume=own, position=position(own.state), remarks=tuple(warned), notes=tuple(noted))
    except UnreadableError as error:
        raise UnreadableError(f"run_dir={config.run_dir}: {error}; or begin anew in another run_dir") from error
    except CheckpointError as error:
        damage = str(error)
    lost = looked(check, lambda: lost_checkpoints(run_dir, config.checkpoint.every_steps, damage), patience)
    if lost is not None:
        raise (CheckpointError if check is Verification.SIZES else ConfigError)(lost)
    if config.stage.init_from is None:
        return Start()
    named = f"stage.init_from={config.stage.init_from}"
    try:
        weights = resolve_weights("stage.init_from", config.stage.init_from, check, config.model.name, patience)
        if isinstance(weights, Checkpoint):
            check_state(weights)
        looked(check, lambda: check_schedule(config, weights), patience)
        unfinished = unfinished_stage(weights)
    except UnreadableError as error:
        raise UnreadableError(f"{named}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{named}: {error}; give another checkpoint, or train that stage again") from error
    remarks = () if unfinished is None else (f"{named}: {unfinished}",)
    return Start(weights=weights, remarks=remarks)


def _patience(config: TrainConfig) -> float:
    """How many seconds a start waits for an error that may pass."""
    limit = config.watchdog_seconds
    return START_PATIENCE_SECONDS if limit is None else min(START_PATIENCE_SECONDS, PATIENCE_OF_WATCHDOG * limit)


def check_state(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose trainer state is not one, whatever its checksums say.

    Raises:
        CheckpointError: it is not.
    """
    try:
        trained_stage(checkpoint.state)
        TrainState.from_dict(checkpoint.state[STATE])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint}: is damaged ({one_line(error)[:200]})") from error


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
    lines: list[str] = []
    if start.resume is not None:
        # Earlier versions recorded no contents. A file that has moved is compared with the one at its old path, which
        # may be there on some nodes alone.
        before = frozen_files(recorded_config(content)["model"])
        moved = {name: path for name, path in before.items() if files.get(name, path) != path and name not in recorded}
        for setting, found in distributed.on_first(lambda: _contents_of(moved)).items():
            if found is not None:
                recorded[setting] = found
                continue
            was = f"{setting}={files[setting]}: was {moved[setting]}"
            lines.append(f"{was}; assumed to be the same file, which cannot be checked")
    for setting, content_now in now.items():
        # A setting in only one of the two is not compared.
        if recorded.get(setting, content_now) == content_now:
            continue
        other = f"{setting}={files[setting]}: contents differ from those that"
        if start.resume is not None:
            raise ConfigError(
                f"{other} run_dir={config.run_dir} was trained with (SHA-256 {recorded[setting][:12]}, now "
                f"{content_now[:12]}); restore that file, or give another run_dir"
            )
        lines.append(f"{other} stage.init_from={config.stage.init_from} was trained with")
    return lines


def _contents_of(files: Mapping[str, str]) -> dict[str, str | None]:
    """SHA-256 of each file by setting; None if it does not exist."""
    paths = {setting: Path(path).expanduser() for setting, path in files.items()}
    return {setting: sha256(path) if path.is_file() else None for setting, path in paths.items()}


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
    setting: str,
    value: str,
    check: Verification = Verification.TOGETHER,
    model: str | None = None,
    patience: float = PATIENCE_SECONDS,
) -> Checkpoint | Path:
    """The weights folder (its path) or checkpoint that a setting names; of a run folder, its latest checkpoint.

    Args:
        check: what makes a checkpoint of a run folder count as damaged, so that an older one is taken.
        model: name of the model that needs the weights, for the import command in the error.
        patience: how many seconds an error that may pass is waited for.

    Raises:
        ConfigError: neither is there. If the setting names published weights, the error holds their import command.
        CheckpointError: the checkpoint is damaged, or cannot be read.
    """
    path = located(value)
    remedy = f"train that stage first, or make it with `{import_of(path)}`"

    def look() -> str:
        if is_weights_folder(path):
            return WEIGHTS
        if is_checkpoint(path):
            return CHECKPOINT
        if not (path / CHECKPOINTS).is_dir() and is_published(path):
            raise import_first(setting, value, model)
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(f"{setting}={value}: does not exist; {remedy}") from None
        return RUN

    kind = looked(check, look, patience)
    if kind == WEIGHTS:
        return path
    if kind == CHECKPOINT:
        return verify(path, check, patience)
    nothing = f"{setting}={value}: holds no complete checkpoint and no imported weights"
    try:
        found = latest(path / CHECKPOINTS, check, patience)
    except UnreadableError:
        raise
    except CheckpointError as error:
        raise ConfigError(f"{nothing} ({error}); {remedy}") from error
    if found is None:
        raise ConfigError(f"{nothing}; {remedy}")
    return found


def open_weights(
    setting: str, value: str, which: str = "ema", trust: Sequence[str] = ()
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The model of the diffuser that a setting names, and its tensors by name; each is read on access.

    Args:
        value: a run folder, a checkpoint folder or a weights folder.
        which: "ema" or "model" of a checkpoint. A weights folder holds one set of weights for both.
        trust: modules whose classes its model may name, beside this package's own.

    Raises:
        ConfigError: it holds nothing complete, or names a class that is not trusted.
    """
    try:
        source = resolve_weights(setting, value, Verification.ALONE)
        if isinstance(source, Checkpoint):
            check_state(source)
        model = model_of(source, setting)
        check_parts(model, trust, f"{setting}={value}")
        if isinstance(source, Path):
            return model, open_weights_folder(source, setting)
        return model, checkpoint_weights(source, which)
    except CheckpointError as error:
        raise ConfigError(f"{setting}={value}: {error}") from error


def checkpoint_weights(checkpoint: Checkpoint, which: str = "model", verify_checksums: bool = True) -> LazyTensors:
    """The weights of a checkpoint under the names of its model: its adapters are added to the weights beside them.

    Raises:
        CheckpointError: it is damaged, or has no weights of that kind.
    """
    weights = checkpoint.weights(which) if verify_checksums else checkpoint.unchecked_weights(which)
    if not any(is_adapter(name) for name in weights):
        return weights
    try:
        lora = recorded(LoraConfig, "lora", recorded_config(checkpoint.state).get("lora"))
        return merged(weights, scale_of(lora))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: {one_line(error)}, of the adapters of a checkpoint") from error


def model_of(source: Checkpoint | Path, setting: str) -> ModelConfig:
    """The model of a checkpoint or of a weights folder, whose classes nobody has checked.

    A checkpoint's `resolution` is that of its latest phase.

    Raises:
        CheckpointError, WeightsError: its configuration is not a model's.
    """
    if isinstance(source, Path):
        return weights_folder_model(source, setting)
    try:
        model = recorded_model(recorded_config(source.state)["model"])
        phases, state = trained_stage(source.state).phases, TrainState.from_dict(source.state[STATE])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    return replace(model, resolution=phases[min(state.phase, len(phases) - 1)].resolution) if phases else model


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
