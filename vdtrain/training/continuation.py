"""Resuming a run with changed settings: what its position then means, and which settings must not change.

A position counts the steps of each phase. Trained phases keep their resolution and steps. The last started phase may
become longer, or end at any later step. Phases after it may change freely.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vdtrain.config.compose import ConfigError
from vdtrain.config.schema import ModelConfig, StageConfig, TrainConfig
from vdtrain.config.validation import phase_steps
from vdtrain.files import FileRecord
from vdtrain.models.frozen_weights import locate, named_files, names_file, reads_weights
from vdtrain.run import distributed
from vdtrain.training.state import TrainState


def frozen_files(model: ModelConfig | DictConfig) -> dict[str, str]:
    """The files of all frozen parts by setting."""
    files: dict[str, str] = {}
    for name, modality in model.modalities.items():
        for part in ("vae", "context_encoder"):
            specification = modality[part] if isinstance(modality, DictConfig) else getattr(modality, part)
            if isinstance(specification, DictConfig):
                specification = OmegaConf.to_container(specification, resolve=True)
            files |= named_files(specification, f"model.modalities.{name}.{part}")
    return files


def frozen_contents(model: ModelConfig) -> dict[str, str]:
    """SHA-256 of every file of the frozen parts, by setting; of none inside `without_weights`.

    Every process calls this together and reads its share of the files.

    Raises:
        SharedError: on every process, if a file cannot be read on one of them.
    """
    named = frozen_files(model) if reads_weights() else {}
    files = {setting: locate(path, setting) for setting, path in named.items()}
    own = sorted(set(files.values()))[distributed.rank() :: distributed.world_size()]
    hashes, failure = {}, None
    try:
        hashes = {str(path): sha256(path) for path in own}
    except OSError as error:
        failure = f"{error.filename}: cannot be read ({error.strerror}); fetch it again"
    distributed.raise_if_any(failure)
    shares = distributed.gather_json(hashes)
    everything = {path: value for share in shares for path, value in share.items()}
    return {setting: everything[str(path)] for setting, path in files.items()}


def sha256(path: Path) -> str:
    """A file's hash, computed once per process unless the file changes."""
    found = path.stat()
    return _sha256(path, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache
def _sha256(path: Path, *version: int) -> str:
    return FileRecord.of(path).sha256


def differing(recorded: Mapping[str, str], contents: Mapping[str, str]) -> list[str]:
    """Settings whose file differs from the record; settings in only one of the two are not compared."""
    return [setting for setting, value in contents.items() if recorded.get(setting, value) != value]


# These define a run's weights and position: they must not change.
FIXED = (
    "seed",
    "stage.name",
    "stage.flows",
    "stage.global_batch_size",
    "model.diffuser",
    "model.modalities",
    "model.schedule",
    "model.latent_downsampling",
)
# These may change and are reported. All others concern the machine, the disk or the display.
SAID = ("stage", "optimizer", "objective", "ema", "data.stream", "data.latents", "hardware.precision")
UNSAID = ("data.stream.cache", "data.stream.shard_root")
# Tables of the user's own entries: a new entry is a change. Elsewhere a new setting comes from a newer version.
TABLES = ("stage.gradient_scales", "stage.phases", "objective.flow_weights", "data.stream", "model.modalities")
# These define which samples a position in the data stands for.
ORDER = ("weights", "lanes", "block", "min_side", "_target_")
UNSET = "unset"
# Keys of a checkpoint's trainer state: configuration, position, contents of the frozen parts' files.
CONFIG, STATE, FROZEN = "config", "state", "frozen"


def trained_stage(content: Mapping[str, Any]) -> StageConfig:
    """The stage in a checkpoint's trainer state, as it was when written."""
    raw_config = OmegaConf.create(content[CONFIG])
    OmegaConf.resolve(raw_config)
    stage = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StageConfig), raw_config.stage))
    assert isinstance(stage, StageConfig)
    return stage


def stage_steps(stage: StageConfig) -> list[int]:
    """Optimiser steps of each phase."""
    return [phase_steps(TrainConfig(stage=stage), phase) for phase in stage.phases]


def position(content: Mapping[str, Any]) -> TrainState:
    """The position in a checkpoint's trainer state, in a form that holds under every configuration it maps to.

    Raises:
        ValueError: an earlier version of vdtrain allowed its phases to change on the way.
    """
    return TrainState.from_dict(content[STATE]).settled(stage_steps(trained_stage(content)))


def changes(content: Mapping[str, Any], raw_config: DictConfig, stage: StageConfig, run_dir: str) -> list[str]:
    """One line per setting that differs from the checkpoint's.

    Args:
        content: trainer state of the checkpoint.
        raw_config: the composed configuration, unresolved.
        stage: the composed stage.

    Raises:
        ConfigError: a setting must not change, or the position does not fit the phases.
    """
    before = OmegaConf.create(content[CONFIG])
    old, new = _flat(before), _flat(raw_config)
    other_run = f"give another run_dir, with stage.init_from={run_dir} to continue from its weights"
    lines = []
    mid_epoch = TrainState.from_dict(content[STATE]).phase_step > 0
    _check_position(content, stage, run_dir, other_run)
    for setting in [*new, *(each for each in old if each not in new)]:
        was, becomes = old.get(setting, UNSET), new.get(setting, UNSET)
        other_version = (setting in old) != (setting in new) and not _within(setting, TABLES)
        # `start.check_frozen` compares files by their contents.
        if was == becomes or other_version or (names_file(was) and names_file(becomes)):
            continue
        if _within(setting, FIXED):
            # Weights fit only their own model.
            remedy = "give another run_dir" if setting.startswith("model.") else other_run
            earlier = f"run_dir={run_dir} has {_shown(was)}"
            raise ConfigError(f"{setting}={_shown(becomes)}: {earlier}; restore it, or {remedy}")
        if not _within(setting, SAID) or _within(setting, UNSAID):
            continue
        note = ""
        if setting == "stage.init_from":
            if _text(before, setting) == _text(raw_config, setting):
                # The same reference; only the folder behind it has moved.
                continue
            note = "; no effect, because the run has its own weights"
        elif mid_epoch and setting.split(".")[:2] == ["data", "stream"] and setting.split(".")[2] in ORDER:
            note = "; in this epoch some samples repeat and others are missed"
        lines.append(f"{setting}={_shown(becomes)}: was {_shown(was)} until now{note}")
    return lines


def _check_position(content: Mapping[str, Any], stage: StageConfig, run_dir: str, other_run: str) -> None:
    """Refuse phases that differ from the trained ones, up to the position in the last started phase."""
    before = trained_stage(content)
    old, new = stage_steps(before), stage_steps(stage)
    try:
        done = TrainState.from_dict(content[STATE]).done(old)
    except ValueError as error:
        raise ConfigError(
            f"run_dir={run_dir}: its phases were changed on the way, so its position is undefined ({error}); "
            f"{other_run}"
        ) from error
    for index, trained in enumerate(done):
        place = f"stage.phases.{index}"
        if index >= len(new):
            raise ConfigError(
                f"stage.phases: has {len(new)} phases, but run_dir={run_dir} has trained {len(done)}; restore them, or "
                f"{other_run}"
            )
        was, becomes = before.phases[index].resolution, stage.phases[index].resolution
        if was != becomes:
            raise ConfigError(
                f"{place}.resolution={becomes}: run_dir={run_dir} has trained {trained} steps at {was}; "
                f"restore it and change only phases after phase {len(done) - 1}, or {other_run}"
            )
        last = index == len(done) - 1
        if trained == new[index] or (last and trained < new[index]):
            continue
        changed: tuple[str, float, float] = (
            f"{place}.samples",
            before.phases[index].samples,
            stage.phases[index].samples,
        )
        if stage.samples_scale != before.samples_scale:
            changed = ("stage.samples_scale", before.samples_scale, stage.samples_scale)
        setting, was_value, value = changed
        remedy = "restore it"
        if sum(new) > sum(old):
            remedy += f" and train as long with {_longer(before, sum(new) - sum(old[:-1]))}"
        done_there = f"all {trained}" if trained == old[index] else f"{trained}"
        raise ConfigError(
            f"{setting}={value}: was {was_value}; run_dir={run_dir} has trained {done_there} steps at {was} pixels, "
            f"but this setting gives {new[index]}; {remedy}, or {other_run}"
        )


def _longer(stage: StageConfig, steps: int) -> str:
    """The override that gives a stage's last phase `steps` steps."""
    samples = int(steps * stage.global_batch_size / stage.samples_scale)
    # Rounding may leave it a sample short.
    while int(samples * stage.samples_scale) // stage.global_batch_size < steps:
        samples += 1
    return f"stage.phases.{len(stage.phases) - 1}.samples={samples}"


def _flat(raw_config: DictConfig) -> dict[str, Any]:
    """All values of a configuration by full name; phases by index, other lists whole."""
    return dict(_leaves("", OmegaConf.to_container(raw_config, resolve=True)))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    prefix = f"{name}." if name else ""
    # An empty table has no values.
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(f"{prefix}{key}", entry)
    elif name == "stage.phases" and isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _leaves(f"{prefix}{number}", entry)
    else:
        yield name, value


def _text(raw_config: DictConfig, setting: str) -> Any:
    """A setting's unresolved text."""
    value: Any = OmegaConf.to_container(raw_config, resolve=False)
    for name in setting.split("."):
        value = value[name]
    return value


def _shown(value: Any) -> str:
    """A value as a user would write it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _within(setting: str, groups: Sequence[str]) -> bool:
    return any(setting == group or setting.startswith(f"{group}.") for group in groups)
