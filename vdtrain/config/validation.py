"""Checks of a training configuration before any GPU or process group is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vdtrain.config.command_schema import SamplingConfig
from vdtrain.config.data_schema import DataConfig
from vdtrain.config.fields import check_values, shown, value_problems
from vdtrain.config.instantiate import find_target, takes
from vdtrain.config.schema import (
    CONSTANT,
    DEEPSPEED,
    LINEAR,
    ModelConfig,
    PhaseConfig,
    TrainConfig,
    strategy_kind,
)
from vdtrain.config.suggestions import meant
from vdtrain.errors import ConfigError, missing, one_line
from vdtrain.flows import Flow, active_groups

# The parts of a modality that a flow uses: of its context, and of its output.
CONTEXT_PARTS, DATA_PARTS = ("context_layers", "context_encoder"), ("data_layers", "vae")


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
                    f"{meant(modality, config.model.modalities)}"
                )
        flows.append(flow)
    return flows


def gradient_scales(config: TrainConfig) -> dict[str, float]:
    """The stage's gradient scales by layer group, e.g. {"data.image": 0.1}, for the groups that its flows use.

    Raises:
        ConfigError: a group without a scale, a scale that is no number of at least 0, or all of them 0.
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
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 <= scale < math.inf:
            raise ConfigError(f"stage.gradient_scales.{group}={shown(scale)}: give a number; 0 freezes the group")
        scales[group] = float(scale)
    if not any(scales.values()):
        raise ConfigError(
            "stage.gradient_scales: 0 for every layer group that the stage's flows use, so nothing is trained; give "
            f"one of {', '.join(scales)} a number above 0"
        )
    return scales


def trained_groups(config: TrainConfig) -> list[str]:
    """The layer groups that a stage trains, in order of first use: those of its flows that are not frozen.

    Raises:
        ConfigError: see `gradient_scales`; or `lora.groups` names a group that is not among them.
    """
    groups, lora = [group for group, scale in gradient_scales(config).items() if scale > 0], config.lora
    if lora.rank is None:
        return groups
    for group in lora.groups:
        if group not in groups:
            raise ConfigError(
                f"lora.groups={shown(lora.groups)}: {group} is not trained by this stage; it trains {', '.join(groups)}"
            )
    return [group for group in groups if group in lora.groups or not lora.groups]


def phase_steps(config: TrainConfig, phase: PhaseConfig) -> int:
    """Optimiser steps of a phase: its samples, scaled, in whole global batches."""
    return int(phase.samples * config.stage.samples_scale) // config.stage.global_batch_size


def warmup_samples(config: TrainConfig) -> float:
    """Samples over which the learning rate rises; `samples_scale` scales them like the phases, down only."""
    return config.optimizer.warmup_samples * min(1.0, config.stage.samples_scale)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The base learning rate of a step of the stage, counted from 1.

    It rises linearly over the warm-up. Then it is constant, or falls until the stage's last step by a straight line or
    by half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983), to `optimizer.final_share` of itself.
    """
    optimizer, stage = config.optimizer, config.stage
    rise, samples = warmup_samples(config), step * stage.global_batch_size
    rate = stage.learning_rate * optimizer.learning_rate_scale
    if samples < rise:
        return rate * (samples / rise)
    total = sum(phase_steps(config, phase) for phase in stage.phases) * stage.global_batch_size
    if optimizer.schedule == CONSTANT or total <= rise:
        return rate
    way = min(1.0, (samples - rise) / (total - rise))
    left = 1.0 - way if optimizer.schedule == LINEAR else (1.0 + math.cos(math.pi * way)) / 2
    return rate * (optimizer.final_share + (1.0 - optimizer.final_share) * left)


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
    if not math.isfinite(settings.guidance_scale):
        raise ConfigError(f"guidance_scale={settings.guidance_scale}: must be a finite number")
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
    """Raise a ConfigError for the first of `problems`."""
    for line in problems(config, world_size):
        raise ConfigError(line)


def check_settings(config: TrainConfig, world_size: int) -> None:
    """Raise a ConfigError for the first of `setting_problems`."""
    for line in setting_problems(config, world_size):
        raise ConfigError(line)


def problems(config: TrainConfig, world_size: int) -> Iterator[str]:
    """A line on each setting that cannot work and each missing file: the setting, its value and the remedy."""
    yield from setting_problems(config, world_size)
    if config.hardware.attention == "xformers" and (line := missing("xformers")) is not None:
        yield f"hardware.attention=xformers: {line}, or choose sdpa"
    yield from missing_weights(config.model, _missing_start(config))
    yield from _data_problems(config)
    yield from _watch_problems(config)
    # These import large libraries.
    yield from _part_problems(config)


def _part_problems(config: TrainConfig) -> Iterator[str]:
    """A line on each part of the stage's flows whose class cannot be imported, or does not take an argument."""
    try:
        flows = stage_flows(config)
    except ConfigError:
        # `setting_problems` reports it.
        return
    used = [
        (modality, part)
        for flow in flows
        for modality, parts in ((flow.context, CONTEXT_PARTS), (flow.output, DATA_PARTS))
        for part in parts
    ]
    for modality, part in dict.fromkeys(used):
        specification = getattr(config.model.modalities[modality], part)
        yield from problem_of(partial(find_target, specification, f"model.modalities.{modality}.{part}"))


def reads_index(config: TrainConfig) -> bool:
    """Whether the stream reads an index; True if the stream cannot be found."""
    try:
        return takes(config.data.stream, "data.stream", "manifest")
    except ConfigError:
        return True


def check_indexed(data: DataConfig, use: str) -> None:
    """Refuse a stream without an index.

    Args:
        use: what needs the index.

    Raises:
        ConfigError: the stream has none.
    """
    if not takes(data.stream, "data.stream", "manifest"):
        raise ConfigError(
            f"data.stream._target_={data.stream['_target_']}: has no index, which {use}; index the shards and write "
            "data.stream=indexed"
        )


def _data_problems(config: TrainConfig) -> Iterator[str]:
    """A line on each way in which the stream's data are missing or do not fit."""
    try:
        # This imports the class.
        target, arguments = find_target(config.data.stream, "data.stream")
    except ConfigError as error:
        yield str(error)
        return
    if hasattr(target, "check"):
        yield from problem_of(lambda: target.check(**arguments))
    if config.data.validation.share:
        from vdtrain.data.loading import check_split

        yield from problem_of(lambda: check_split(config.data))
    if not reads_index(config):
        if config.data.latents == "cached":
            yield from problem_of(lambda: check_indexed(config.data, "data.latents=cached needs"))
    elif config.data.urls:
        yield f"data.urls={shown(config.data.urls)}: only data.stream=webdataset reads it; add that, or leave it out"
    elif not Path(config.data.manifest).exists():
        yield f"data.manifest={config.data.manifest}: does not exist; make it with {_index_command(config.data)}"
    else:
        from vdtrain.data.manifest import SHARDS_FILE

        if Path(config.data.manifest).is_dir() and not (Path(config.data.manifest) / SHARDS_FILE).exists():
            place = f"data.manifest={config.data.manifest}: {SHARDS_FILE}"
            yield f"{place} is not there; make it with {_index_command(config.data)}, or give another folder"
        elif config.data.latents == "cached":
            yield from _latent_problems(config)


def _watch_problems(config: TrainConfig) -> Iterator[str]:
    """A line on each file that samples and validation lack, or cannot use."""
    from vdtrain.media import read_images

    for image in config.samples.images if config.samples.every else ():
        yield from (f"samples.images: {line}" for line in problem_of(partial(read_images, [image], (64, 64))))
    if config.validation.every and config.validation.scored:
        from vdtrain.evaluation.scores import check_clip
        from vdtrain.models.frozen_weights import locate
        from vdtrain.training.scoring import OWN_CLIP

        clip = problem_of(lambda: check_clip(OWN_CLIP, config.model))
        yield from (f"validation.scored={config.validation.scored}: {line}" for line in clip)
        if (weights := config.validation.fid_weights) is not None:
            yield from problem_of(lambda: locate(weights, "validation.fid_weights"))


def _index_command(data: DataConfig) -> str:
    """The command that makes the manifest of a set."""
    if data.sources and not data.shards:
        return f"`python -m data_pipeline index data={data.name}`"
    shards = data.shards or ["FOLDER"]
    value = shards[0] if len(shards) == 1 else f"[{','.join(shards)}]"
    return f"`python -m data_pipeline index data={data.name} data.shards={value}`"


def setting_problems(config: TrainConfig, world_size: int) -> Iterator[str]:
    """A line on each setting that cannot work; files are not looked at."""
    yield from value_problems(config)
    stage = config.stage
    flows = list(problem_of(lambda: stage_flows(config)))
    # The scales are those of the flows' layer groups.
    yield from flows or problem_of(lambda: trained_groups(config))
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
    yield from _unfit_sizes(config)
    yield from _contradictions(config, world_size)


def problem_of(action: Callable[[], object]) -> Iterator[str]:
    """The line of the ConfigError that an action raises, if it raises one."""
    try:
        action()
    except ConfigError as error:
        yield str(error)


def _unfit_sizes(config: TrainConfig) -> Iterator[str]:
    """A line on each size that AdamW or the layers of the diffuser cannot have."""
    if len(config.optimizer.betas) != 2:
        yield f"optimizer.betas={shown(config.optimizer.betas)}: AdamW has two; give two, e.g. [0.9, 0.999]"
    sizes = config.model.diffuser
    place = f"model.diffuser.channels={shown(sizes.channels)}"
    if not sizes.channels:
        yield f"{place}: empty; give the channels of at least one level, e.g. [64, 64]"
        return
    if absent := [level for level in sizes.attention_levels if level >= len(sizes.channels)]:
        levels = f"model.diffuser.attention_levels={shown(sizes.attention_levels)}"
        yield f"{levels}: there is no level {absent[0]}; choose from 0 to {len(sizes.channels) - 1}"
    # The middle has the channels of the last level, and attention.
    attending = [width for level, width in enumerate(sizes.channels) if level in sizes.attention_levels]
    widths = {"norm_groups": sizes.channels, "heads": [*attending, sizes.channels[-1]]}
    for name, divided in widths.items():
        parts = max(1, getattr(sizes, name))
        if odd := [width for width in divided if width % parts]:
            yield f"{place}: model.diffuser.{name}={parts} does not divide {odd[0]}; choose a multiple of {parts}"


def _contradictions(config: TrainConfig, world_size: int) -> Iterator[str]:
    """A line on each setting that does not go with another one."""
    if config.hardware.device == "cpu" and config.hardware.attention == "xformers":
        yield "hardware.attention=xformers: has no CPU kernels; choose sdpa"
    hardware = config.hardware
    if hardware.cuda_graphs and hardware.device != "cuda":
        yield f"hardware.cuda_graphs=true: hardware.device={hardware.device} has no CUDA graphs; choose false"
    if hardware.cuda_graphs and strategy_kind(hardware.zero_stage, hardware.exchange, world_size) == DEEPSPEED:
        yield (
            "hardware.cuda_graphs=true: DeepSpeed's hooks cannot be recorded; choose hardware.exchange=sharded with "
            "hardware.zero_stage=1, or hardware.cuda_graphs=false"
        )
    for name in config.objective.flow_weights:
        if name not in config.stage.flows:
            yield f"objective.flow_weights.{name}: not a flow of this stage; it has {', '.join(config.stage.flows)}"
    optimizer = config.optimizer
    if optimizer.schedule == CONSTANT and optimizer.final_share > 0:
        yield (
            f"optimizer.final_share={optimizer.final_share}: optimizer.schedule=constant does not fall; choose linear "
            "or cosine, or leave it out"
        )
    lora = config.lora
    if lora.rank is None and (lora.alpha is not None or lora.groups or lora.targets):
        yield "lora.rank=null: trains no adapters, but other settings of lora are given; give it a number, e.g. 8"
    if config.data.flip and config.data.latents == "cached":
        yield (
            "data.flip=true: data.latents=cached has the latents of images that are not mirrored; choose "
            "data.latents=inline, or leave it out"
        )
    schedule = config.model.schedule
    if config.samples.every and config.samples.steps > schedule.steps:
        yield f"samples.steps={config.samples.steps}: more than model.schedule.steps={schedule.steps}; choose fewer"
    watch = config.validation
    if watch.every and watch.scored and not config.data.validation.share:
        yield f"validation.scored={watch.scored}: no pairs are held out; set data.validation.share, or scored=0"
    if watch.scored == 1:
        yield "validation.scored=1: a distance needs at least 2 samples; choose more, or 0"
    if watch.fid_weights is not None and not watch.scored:
        yield f"validation.fid_weights={watch.fid_weights}: validation.scored=0 makes no samples for FID; raise it"
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
    from vdtrain.storage.patience import Patience, StreamError, patience_of

    folder, keep = config.data.latent_cache.folder, Patience(patience_of(config.watchdog_seconds)).keep
    try:
        vae = latent_encoder(config.model, MODALITY)
        manifest = keep(config.data.manifest, lambda: Manifest(Path(config.data.manifest)))
    except (ConfigError, ManifestError, StreamError) as error:
        yield one_line(error)
        return
    min_side = config.data.stream.get("min_side")
    for resolution in dict.fromkeys(phase.resolution for phase in config.stage.phases):
        opened = partial(LatentShards, folder, manifest, resolution, vae=vae, min_side=min_side)
        try:
            keep(folder, opened)
        except (ManifestError, StreamError) as error:
            yield one_line(error)


def missing_weights(model: ModelConfig, start: str | None = None) -> Iterator[str]:
    """A line on the files of the frozen parts that are missing, with the command that makes each.

    Args:
        start: a missing weights folder that training starts from; it is named beside other missing files alone.
    """
    files: dict[str, str] = {}
    for name, modality in model.modalities.items():
        for part, arguments in (("vae", modality.vae), ("context_encoder", modality.context_encoder)):
            for setting, file in _missing_files(f"model.modalities.{name}.{part}", arguments):
                files.setdefault(file, setting)
    if not files:
        return
    if len(files) == 1:
        ((file, setting),) = files.items()
        command = _import_command(file, model)
        yield f"{setting}={file}: no such file; {f'`{command}` makes it, or ' if command else ''}give another path"
        return
    if start is not None:
        files[start] = "stage.init_from"
    named = [(file, _import_command(file, model)) for file in files]
    listed = ", ".join(f"{file} (`{command}`)" if command else file for file, command in named)
    every = f"vdtrain weights import all{_of_model(model)}"
    missing = f"{len(files)} files of weights are missing"
    yield f"model={model.name}: {missing}; `{every}` makes those with a command: {listed}"


def _missing_start(config: TrainConfig) -> str | None:
    """The weights folder that a new run starts from, if an import makes it and it does not exist."""
    from vdtrain.checkpoint.folder import CHECKPOINTS

    start = config.stage.init_from
    begun = start is None or Path(start).exists() or Path(config.run_dir, CHECKPOINTS).exists()
    return None if start is None or begun or _import_command(start, config.model) is None else start


def _missing_files(setting: str, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every argument that names a missing weights or tokenizer file: the setting and the file."""
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _missing_files(f"{setting}.{key}", value)
        elif (
            isinstance(value, str)
            and not value.startswith("asset:")
            and Path(value).suffix in (".safetensors", ".json", ".pth", ".ckpt")
            and not Path(value).expanduser().exists()
        ):
            yield f"{setting}.{key}", value


def _import_command(file: str, model: ModelConfig) -> str | None:
    """The command that makes a file of a frozen part, or a weights folder; None if there is none."""
    from vdtrain.weights.imports import FOLDERS, source_of

    source = source_of(file, model) or next((name for name, made in FOLDERS.items() if made == file), None)
    return None if source is None else f"vdtrain weights import {source}{_of_model(model)}"


def _of_model(model: ModelConfig) -> str:
    from vdtrain.weights.imports import DEFAULT_MODEL

    return "" if model.name == DEFAULT_MODEL else f" model={model.name}"
