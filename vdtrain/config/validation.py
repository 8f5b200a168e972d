"""Checks of a training configuration before any GPU or process group is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vdtrain.config.fields import check_values, value_problems
from vdtrain.config.instantiate import find_target
from vdtrain.config.schema import ModelConfig, PhaseConfig, SamplingConfig, TrainConfig
from vdtrain.errors import ConfigError, one_line
from vdtrain.extras import missing
from vdtrain.flows import Flow, active_groups


def stage_flows(config: TrainConfig) -> list[Flow]:
    """The stage's flows, in order.

    Raises:
        ConfigError: no flow, a flow named twice, or a flow with a modality that the model does not have.
    """
    names = config.stage.flows
    known = ", ".join(config.model.modalities)
    if not names:
        raise ConfigError("stage.flows: empty; name at least one flow, e.g. [image-to-image]")
    if len(set(names)) < len(names):
        raise ConfigError(f"stage.flows={names}: a flow is named twice; name each once")
    flows = []
    for name in names:
        try:
            flow = Flow.parse(name)
        except ValueError as error:
            raise ConfigError(f"stage.flows: {error}") from error
        for modality in (flow.context, flow.output):
            if modality not in config.model.modalities:
                raise ConfigError(
                    f"stage.flows: {name} needs modality {modality!r}; model={config.model.name} has {known}"
                )
        flows.append(flow)
    return flows


def gradient_scales(config: TrainConfig) -> dict[str, float]:
    """The stage's gradient scales by layer group, e.g. {"data.image": 0.1}, for the groups that its flows train.

    Raises:
        ConfigError: a trained group without a scale, or a scale that is not a positive number.
    """
    flat: dict[str, Any] = {}
    for kind, value in config.stage.gradient_scales.items():
        flat |= (
            {f"{kind}.{modality}": scale for modality, scale in value.items()}
            if isinstance(value, Mapping)
            else {kind: value}
        )
    scales = {}
    for group in active_groups(stage_flows(config)):
        if group not in flat:
            raise ConfigError(
                f"stage.gradient_scales.{group}: missing, and the stage's flows train it; give it a number"
            )
        scale = flat[group]
        if not isinstance(scale, int | float) or scale <= 0:
            raise ConfigError(
                f"stage.gradient_scales.{group}={scale}: not a positive number; leave the flow out to freeze a group"
            )
        scales[group] = float(scale)
    return scales


def phase_steps(config: TrainConfig, phase: PhaseConfig) -> int:
    """Optimiser steps of a phase: its samples, scaled, in whole global batches."""
    return int(phase.samples * config.stage.samples_scale) // config.stage.global_batch_size


def warmup_samples(config: TrainConfig) -> float:
    """Samples over which the learning rate rises; `samples_scale` scales them like the phases, down only."""
    return config.optimizer.warmup_samples * min(1.0, config.stage.samples_scale)


def micro_batches(config: TrainConfig, resolution: int, world_size: int) -> int:
    """Number of micro-batches per process and step.

    Each holds the largest number of pairs that divides the process's batch and is within `hardware.micro_batch_size`.

    Raises:
        ConfigError: the hardware has no entry for the resolution, or the batch does not divide over the processes.
    """
    sizes = config.hardware.micro_batch_size
    batch = config.stage.global_batch_size
    if resolution not in sizes:
        raise ConfigError(
            f"hardware.micro_batch_size: no entry for resolution {resolution}, only {sorted(sizes)}; "
            f"add '+hardware.micro_batch_size={{{resolution}: N}}'"
        )
    limit = sizes[resolution]
    if limit < 1:
        raise ConfigError(f"hardware.micro_batch_size.{resolution}={limit}: must be at least 1")
    if batch % world_size:
        below = batch - batch % world_size
        choices = [str(size) for size in (below, below + world_size) if size]
        raise ConfigError(
            f"stage.global_batch_size={batch}: does not divide over {world_size} processes; choose "
            f"{' or '.join(choices)}, or another number of processes"
        )
    local = batch // world_size
    return next(count for count in range(1, local + 1) if local % count == 0 and local // count <= limit)


def check_sampling(settings: SamplingConfig, model: ModelConfig) -> None:
    """Refuse settings that no sample can be drawn with.

    Raises:
        ConfigError: with the setting, its value and the remedy.
    """
    check_values(settings)
    check_resolution("height", settings.height, model)
    check_resolution("width", settings.width, model)


def check_resolution(setting: str, resolution: int, model: ModelConfig) -> None:
    """Refuse a resolution that the image VAE and the levels of the diffuser cannot halve.

    Raises:
        ConfigError: it is not a multiple of the VAE's downsampling times that of the deepest level.
    """
    multiple = max(1, model.latent_downsampling * 2 ** (len(model.diffuser.channels) - 1))
    if resolution < multiple or resolution % multiple:
        raise ConfigError(
            f"{setting}={resolution}: not a multiple of {multiple} (model.latent_downsampling x the deepest level's); "
            f"try {max(multiple, -(-resolution // multiple) * multiple)}"
        )


def check(config: TrainConfig, world_size: int) -> None:
    """Refuse a configuration that cannot work, or that names missing files.

    Raises:
        ConfigError: with the setting, its value and the remedy, in one line.
    """
    for line in problems(config, world_size):
        raise ConfigError(line)


def check_settings(config: TrainConfig, world_size: int) -> None:
    """Refuse settings that cannot work; files are not looked at.

    Raises:
        ConfigError: with the setting, its value and the remedy, in one line.
    """
    for line in setting_problems(config, world_size):
        raise ConfigError(line)


def problems(config: TrainConfig, world_size: int) -> Iterator[str]:
    """A line on everything that `check` refuses."""
    yield from setting_problems(config, world_size)
    if config.hardware.attention == "xformers" and (line := missing("xformers")) is not None:
        yield f"hardware.attention=xformers: {line}, or choose sdpa"
    for name, modality in config.model.modalities.items():
        for part, arguments in (("vae", modality.vae), ("context_encoder", modality.context_encoder)):
            yield from _file_problems(f"model.modalities.{name}.{part}", arguments, config.model)
    if not Path(config.data.manifest).exists():
        yield (
            f"data.manifest={config.data.manifest}: does not exist; make it with "
            f"`python -m data_pipeline index data={config.data.name}`"
        )
    elif config.data.latents == "cached":
        yield from _latent_problems(config)
    # Last, as it imports the class.
    yield from problem_of(lambda: find_target(config.data.stream, "data.stream"))


def setting_problems(config: TrainConfig, world_size: int) -> Iterator[str]:
    """A line on everything that `check_settings` refuses."""
    yield from value_problems(config)
    stage = config.stage
    flows = list(problem_of(lambda: stage_flows(config)))
    # The scales are those of the flows' layer groups.
    yield from flows or problem_of(lambda: gradient_scales(config))
    if not stage.phases:
        yield "stage.phases: empty; give at least one {resolution: R, samples: N}"
    for index, phase in enumerate(stage.phases):
        yield from problem_of(
            partial(check_resolution, f"stage.phases.{index}.resolution", phase.resolution, config.model)
        )
        yield from problem_of(partial(micro_batches, config, phase.resolution, world_size))
        if stage.global_batch_size > 0 and phase_steps(config, phase) < 1:
            yield (
                f"stage.phases.{index}.samples={phase.samples} x samples_scale={stage.samples_scale}: "
                f"less than one batch of {stage.global_batch_size}"
            )
    yield from _contradictions(config)


def problem_of(action: Callable[[], object]) -> Iterator[str]:
    """The line of the ConfigError that an action raises, if it raises one."""
    try:
        action()
    except ConfigError as error:
        yield str(error)


def _contradictions(config: TrainConfig) -> Iterator[str]:
    """A line on each setting that does not go with another one."""
    if config.hardware.device == "cpu" and config.hardware.attention == "xformers":
        yield "hardware.attention=xformers: has no CPU kernels; choose sdpa"
    for name in config.objective.flow_weights:
        if name not in config.stage.flows:
            yield f"objective.flow_weights.{name}: not a flow of this stage; it has {', '.join(config.stage.flows)}"
    schedule = config.model.schedule
    if schedule.beta_start > schedule.beta_end:
        yield (
            f"model.schedule.beta_start={schedule.beta_start}: above beta_end={schedule.beta_end}; lower it, or write "
            "model.schedule=released or paper"
        )
    checkpoint = config.checkpoint
    kept, every = checkpoint.keep_every_steps, checkpoint.every_steps
    if kept is not None and kept % max(1, every):
        yield (
            f"checkpoint.keep_every_steps={kept}: not a multiple of checkpoint.every_steps={every}, so there is no "
            "checkpoint to keep; choose a multiple, or null"
        )


def latent_encoder(model: ModelConfig, modality: str) -> str:
    """Fingerprint of a modality's VAE, whose encoding is to be cached.

    Raises:
        ConfigError: the modality does not exist, its VAE has no moments, or its weights are missing or random.
    """
    from vdtrain.models.frozen_weights import fingerprint

    if modality not in model.modalities:
        raise ConfigError(f"data.latents=cached: model={model.name} has no modality {modality!r}; choose inline")
    setting = f"model.modalities.{modality}.vae"
    specification = model.modalities[modality].vae
    target, _ = find_target(specification, setting)
    if not hasattr(target, "from_moments"):
        raise ConfigError(f"data.latents=cached: {setting} has no moments that can be cached; choose inline")
    return fingerprint(specification, setting)


def _latent_problems(config: TrainConfig) -> Iterator[str]:
    """A line on each phase whose cached latents are missing, or were made with other settings."""
    from vdtrain.data.latents import MODALITY, LatentShards
    from vdtrain.data.manifest import Manifest, ManifestError

    try:
        vae = latent_encoder(config.model, MODALITY)
        manifest = Manifest(Path(config.data.manifest))
    except (ConfigError, ManifestError) as error:
        yield one_line(error)
        return
    min_side = config.data.stream.get("min_side")
    for resolution in dict.fromkeys(phase.resolution for phase in config.stage.phases):
        try:
            LatentShards(config.data.latent_cache.folder, manifest, resolution, vae=vae, min_side=min_side)
        except ManifestError as error:
            yield one_line(error)


def _file_problems(setting: str, arguments: Mapping[str, Any], model: ModelConfig) -> Iterator[str]:
    """A line on every argument that names a missing weights or tokenizer file."""
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _file_problems(f"{setting}.{key}", value, model)
        elif (
            isinstance(value, str)
            and not value.startswith("asset:")
            and Path(value).suffix in (".safetensors", ".json", ".pth", ".ckpt")
            and not Path(value).exists()
        ):
            yield f"{setting}.{key}={value}: no such file; {_origin(value, model)}give another path"


def _origin(file: str, model: ModelConfig) -> str:
    """The beginning of a remedy: the command that makes a file of a frozen part; empty if there is none."""
    from vdtrain.weights.imports import DEFAULT_MODEL, source_of

    source = source_of(file, model)
    if source is None:
        return ""
    if model.name != DEFAULT_MODEL:
        source += f" model={model.name}"
    return f"`vdtrain weights import {source}` makes it, or "
