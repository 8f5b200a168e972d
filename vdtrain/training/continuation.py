"""Resuming a run with changed settings: what its position then means, and which settings must not change.

A position counts the steps of each phase. Trained phases keep their resolution and steps. The last started phase may
become longer, or end at any later step. Phases after it may change freely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from vdtrain.checkpoint.folder import CheckpointError
from vdtrain.config.compose import ConfigError
from vdtrain.config.fields import shown
from vdtrain.config.instantiate import leaves, recorded, resolved
from vdtrain.config.schema import CONSTANT, ModelConfig, StageConfig, TrainConfig
from vdtrain.config.validation import phase_steps
from vdtrain.files import FileRecord
from vdtrain.models.frozen_weights import locate, named_files, names_file, reads_weights
from vdtrain.redaction import redacted
from vdtrain.run import distributed


@dataclass
class TrainState:
    """Position in a stage. Data order, noise and learning rate are functions of it and the configuration.

    Attributes:
        step: optimiser steps since the start of the stage.
        phase: index of the next step's phase.
        phase_step: finished optimiser steps of that phase.
        skipped: steps skipped because a loss or a gradient was not finite.
        replaced: bad samples replaced by others.
        data: identity of the stream's files; "" if it has none.
    """

    step: int = 0
    phase: int = 0
    phase_step: int = 0
    skipped: int = 0
    replaced: int = 0
    data: str = ""

    def done(self, steps: Sequence[int]) -> list[int]:
        """Finished steps of every started phase, in order.

        Args:
            steps: of each phase, in the configuration that the position belongs to.

        Raises:
            ValueError: a run with these phases cannot reach this position.
        """
        done = [*steps[: self.phase], self.phase_step]
        while len(done) > 1 and done[-1] == 0:
            done.pop()
        if self.phase > len(steps) or sum(done) != self.step or len(done) > len(steps):
            raise ValueError(f"step {self.step} is not step {self.phase_step} of phase {self.phase}, of {list(steps)}")
        return done

    def settled(self, steps: Sequence[int]) -> TrainState:
        """The same position, expressed as the end of a phase: the next phase may change."""
        done = self.done(steps)
        return replace(self, phase=len(done) - 1, phase_step=done[-1])

    def completes(self, steps: Sequence[int]) -> bool:
        """Whether phases with these numbers of steps are complete."""
        return self.phase >= len(steps) or (self.phase == len(steps) - 1 and self.phase_step >= steps[-1])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of `asdict`.

        Raises:
            TypeError, ValueError: the values are not those of a position.
        """
        found = cls(**values)
        numbers = (found.step, found.phase, found.phase_step, found.skipped, found.replaced)
        if any(type(each) is not int or each < 0 for each in numbers):
            raise ValueError(f"no position: {values}")
        return found


def frozen_files(model: ModelConfig | Mapping[str, Any]) -> dict[str, str]:
    """The files of all frozen parts by setting."""
    modalities = asdict(model)["modalities"] if isinstance(model, ModelConfig) else model["modalities"]
    files: dict[str, str] = {}
    for name, modality in modalities.items():
        for part in ("vae", "context_encoder"):
            files |= named_files(modality[part], f"model.modalities.{name}.{part}")
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
    "lora",
)
# These may change, with a warning. All others concern the machine, the disk or the display.
SAID = (
    *("stage", "optimizer", "objective", "ema", "hardware.precision"),
    *("data.stream", "data.urls", "data.latents", "data.flip", "data.validation"),
)
UNSAID = ("data.stream.cache", "data.stream.follow", "data.stream.shard_root", "data.stream.timeout")
# Tables of the user's own entries: a new entry is a change. Elsewhere a new setting comes from a newer version.
TABLES = ("stage.gradient_scales", "stage.phases", "objective.flow_weights", "data.stream", "model.modalities")
# These define which samples a position in the data stands for.
ORDER = ("weights", "lanes", "block", "min_side", "_target_")
HELD_OUT = "data.validation.share"
UNSET = "unset"
# Keys of a checkpoint's trainer state: configuration, position, contents of the frozen parts' files.
CONFIG, STATE, FROZEN = "config", "state", "frozen"


def trained_stage(content: Mapping[str, Any]) -> StageConfig:
    """The stage in a checkpoint's trainer state, as it was when written."""
    # A position does not depend on where the stage started, which may come from the environment.
    stage = {**recorded_config(content)["stage"], "init_from": None}
    try:
        return recorded(StageConfig, "stage", stage)
    except ValueError as error:
        raise CheckpointError(f"{error}, in the configuration of a checkpoint") from error


def recorded_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in a checkpoint's trainer state, with its references followed; see `config.instantiate`.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        found = resolved(content[CONFIG])
        if not isinstance(found, dict) or not all(isinstance(found.get(part), dict) for part in ("stage", "model")):
            raise ValueError("no stage and model")
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{error}, in the configuration of a checkpoint") from error
    return found


def held_out_of(content: Mapping[str, Any]) -> tuple[str, float]:
    """The identity of the data in a checkpoint's trainer state, and the share of it that its run held out."""
    try:
        share = recorded_config(content)["data"]["validation"]["share"]
        return str(content[STATE]["data"]), float(share or 0.0)
    except (KeyError, TypeError, ValueError):
        return "", 0.0


def stage_steps(stage: StageConfig) -> list[int]:
    """Optimiser steps of each phase."""
    return [phase_steps(TrainConfig(stage=stage), phase) for phase in stage.phases]


def position(content: Mapping[str, Any]) -> TrainState:
    """The position in a checkpoint's trainer state, in a form that holds under every configuration it maps to.

    Raises:
        ValueError: an earlier version of vdtrain allowed its phases to change on the way.
    """
    return TrainState.from_dict(content[STATE]).settled(stage_steps(trained_stage(content)))


def changes(
    content: Mapping[str, Any], raw_config: DictConfig, stage: StageConfig, run_dir: str
) -> tuple[list[str], list[str]]:
    """One line per setting that differs from the checkpoint's: those that change the training, and the others.

    Args:
        content: trainer state of the checkpoint.
        raw_config: the composed configuration, unresolved.
        stage: the composed stage.

    Raises:
        ConfigError: a setting must not change, or the position does not fit the phases.
    """
    # A new password or signature of the same address is no change.
    now: Any = redacted(OmegaConf.to_container(raw_config, resolve=False))
    old, new = dict(leaves("", redacted(recorded_config(content)))), dict(leaves("", resolved(now)))
    other_run = f"give another run_dir, with stage.init_from={run_dir} to continue from its weights"
    # Earlier versions held none out.
    old.setdefault(HELD_OUT, None)
    lines, others = [], []
    schedule = raw_config.optimizer.schedule
    mid_epoch = TrainState.from_dict(content[STATE]).phase_step > 0
    _check_position(content, stage, run_dir, other_run)
    # Settings that an earlier version did not have had what is now their default.
    defaults = leaves("", OmegaConf.to_container(OmegaConf.structured(TrainConfig)))
    old = {name: value for name, value in defaults if name in new and value != MISSING} | old
    for setting in [*new, *(each for each in old if each not in new)]:
        was, becomes = old.get(setting, UNSET), new.get(setting, UNSET)
        other_version = (setting in old) != (setting in new) and not within(setting, TABLES)
        # `start.check_frozen` compares files by their contents.
        if was == becomes or other_version or (names_file(was) and names_file(becomes)):
            continue
        if within(setting, FIXED):
            # Weights fit only their own model.
            remedy = "give another run_dir" if setting.startswith("model.") else other_run
            earlier = f"run_dir={run_dir} has {shown(was)}"
            raise ConfigError(f"{setting}={shown(becomes)}: {earlier}; restore it, or {remedy}")
        line = f"{setting}={shown(becomes)}: was {shown(was)} until now"
        if not within(setting, SAID) or within(setting, UNSAID):
            others.append(line)
            continue
        note = ""
        if setting == "stage.init_from":
            if _at(content[CONFIG], setting) == _at(now, setting):
                # The same reference; only the folder behind it has moved.
                continue
            note = "; no effect, because the run has its own weights"
        elif setting == HELD_OUT:
            note = "; the order of the samples changes with it, and pairs that are held out now were trained on before"
        elif setting.startswith(("stage.phases.", "stage.samples_scale")) and schedule != CONSTANT:
            note = f"; optimizer.schedule={schedule} falls until the new end of the stage"
        elif mid_epoch and setting.split(".")[:2] == ["data", "stream"] and setting.split(".")[2] in ORDER:
            note = "; in this epoch some samples repeat and others are missed"
        lines.append(f"{line}{note}")
    return lines, others


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
        change = f"{place}.samples={stage.phases[index].samples}: was {before.phases[index].samples}"
        if stage.samples_scale != before.samples_scale:
            change = f"stage.samples_scale={stage.samples_scale}: was {before.samples_scale}"
        remedy = "restore it"
        if sum(new) > sum(old):
            remedy += f" and train as long with {_longer(before, sum(new) - sum(old[:-1]))}"
        done_there = f"all {trained}" if trained == old[index] else f"{trained}"
        raise ConfigError(
            f"{change}; run_dir={run_dir} has trained {done_there} steps at {was} pixels, but this setting gives "
            f"{new[index]}; {remedy}, or {other_run}"
        )


def _longer(stage: StageConfig, steps: int) -> str:
    """The override that gives a stage's last phase `steps` steps."""
    samples = int(steps * stage.global_batch_size / stage.samples_scale)
    # Rounding may leave it a sample short.
    while int(samples * stage.samples_scale) // stage.global_batch_size < steps:
        samples += 1
    return f"stage.phases.{len(stage.phases) - 1}.samples={samples}"


def _at(value: Any, setting: str) -> Any:
    """A setting's value in a configuration."""
    for name in setting.split("."):
        value = value[name]
    return value


def within(setting: str, groups: Sequence[str]) -> bool:
    """Whether a setting is one of these, or part of one of these tables."""
    return any(setting == group or setting.startswith(f"{group}.") for group in groups)
