"""Builds the parts of a trainer: diffuser, engine, objective, EMA, saver and reporter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vdtrain.checkpoint.folder import CHECKPOINTS
from vdtrain.checkpoint.saver import BackgroundSaver
from vdtrain.checkpoint.store import CheckpointStore, load
from vdtrain.config.compose import ConfigError
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.config.validation import gradient_scales, stage_flows
from vdtrain.diffusion.objective import Objective
from vdtrain.diffusion.schedule import Schedule
from vdtrain.engine.deepspeed import EngineSettings
from vdtrain.engine.engine import Engine, ShardEMA
from vdtrain.flows import active_groups
from vdtrain.models.context_layers import use_kernel
from vdtrain.models.diffuser import Diffuser, allocated, layer_group
from vdtrain.models.execution import checkpoint_activations, compile_training, record_passes
from vdtrain.models.frozen import build_frozen
from vdtrain.models.trained import trained_parameters
from vdtrain.redaction import redacted
from vdtrain.run import distributed
from vdtrain.run.pulse import moved
from vdtrain.run.watchdog import DUMPS, Watchdog
from vdtrain.tracking.reporting import Reporter
from vdtrain.training.continuation import CONFIG, FROZEN, TrainState, frozen_contents
from vdtrain.training.start import Start, checkpoint_weights, model_of
from vdtrain.training.trainer import Trainer
from vdtrain.weights.folder import open_weights_folder
from vdtrain.weights.tensor_files import LazyTensors

CPU = torch.device("cpu")


def build_trainer(
    config: TrainConfig,
    raw_config: DictConfig,
    start: Start,
    place: distributed.RankInfo,
    watchdog: Watchdog | None = None,
    draw_on: torch.device = CPU,
) -> Trainer:
    """Build a trainer that stands at a stage's start. Every process calls this together.

    Args:
        config: checked by `vdtrain.config.validation.check`.
        raw_config: the same configuration, unresolved, for the checkpoints.
        draw_on: where random weights are drawn; a GPU is faster, and draws other numbers than a CPU.

    Raises:
        CheckpointError: the checkpoint to resume from does not fit the stage.
    """
    watchdog = watchdog or Watchdog(None, Path(config.run_dir) / DUMPS, place.rank)
    diffuser = starting_diffuser(config, start, place.device, draw_on)
    flows = stage_flows(config)
    engine = Engine(diffuser, trained_parameters(diffuser, config), engine_settings(config))
    try:
        # Interpolations stay, so that a checkpoint can move between machines.
        recorded = redacted(OmegaConf.to_container(raw_config, resolve=False))
        record = {CONFIG: recorded, FROZEN: frozen_contents(config.model)}
        with draw_on:
            frozen = build_frozen(config.model)
        frozen.to(place.device, engine.compute_dtype)
        if config.hardware.channels_last:
            frozen.to(memory_format=torch.channels_last)
        compile_training(diffuser, frozen, config.hardware.compile)
        if config.hardware.cuda_graphs:
            record_passes(diffuser)
        objective = Objective(flows, Schedule(config.model.schedule, place.device), frozen, config.objective)
        ema = ShardEMA(engine, config.ema.decay, config.ema.length) if config.ema.enabled else None
        if start.resume is not None:
            load(start.resume, engine, ema)
    except BaseException:
        engine.close()
        raise
    state = start.position or TrainState()
    keep = config.checkpoint
    passed_over = () if start.resume is None else start.resume.passed_over
    store = CheckpointStore(Path(config.run_dir) / CHECKPOINTS, keep.keep, keep.keep_every_steps, passed_over)
    saver = BackgroundSaver(store, config.watchdog_seconds and config.watchdog_seconds / 2)
    if start.resume is not None:
        saver.saved_step = state.step
    resolved = redacted(OmegaConf.to_container(raw_config, resolve=True))
    reporter = Reporter(config, resolved, state.step, place.rank)
    return Trainer(
        config,
        place,
        engine=engine,
        objective=objective,
        ema=ema,
        saver=saver,
        reporter=reporter,
        watchdog=watchdog,
        state=state,
        record=record,
    )


def starting_diffuser(config: TrainConfig, start: Start, device: torch.device, draw_on: torch.device = CPU) -> Diffuser:
    """The diffuser with a new stage's starting weights, on `device`. Every process calls this together.

    Rank 0 alone draws and reads the weights and broadcasts them. The diffuser also has the layers that earlier stages
    trained: this stage carries them over to later ones. If the stage resumes, all weights are zero: the checkpoint
    fills them in afterwards.

    Raises:
        ConfigError, CheckpointError, SharedError: on every process, if the weights do not fit or cannot be read.
    """
    drawn: list[Diffuser] = []

    def draw() -> list[str]:
        weights = initial_weights(start, config.model)
        with draw_on:
            drawn.append(Diffuser(config.model, layer_groups(config, weights), seed=config.seed))
        load_weights(drawn[0], weights)
        return list(weights)

    names = distributed.on_first(draw) if start.resume is None else start.resume.weight_names()
    if drawn:
        diffuser = drawn.pop().to(device)
    else:
        diffuser = allocated(config.model, layer_groups(config, names), device)
        for tensor in diffuser.state_dict().values():
            tensor.zero_()
    if start.resume is None and distributed.world_size() > 1:
        for tensor in diffuser.state_dict().values():
            dist.broadcast(tensor, src=0)
            moved(tensor.nbytes)
    if config.hardware.channels_last:
        diffuser.channels_last = True
        # Before the engine, whose buffers have the weights as they lie here.
        diffuser.to(memory_format=torch.channels_last)
    use_kernel(diffuser, config.hardware.attention)
    checkpoint_activations(diffuser, config.hardware.activation_checkpointing)
    return diffuser


def layer_groups(config: TrainConfig, names: Iterable[str]) -> set[str]:
    """The layer groups that a stage's flows use, and those of the given weight names."""
    return {*active_groups(stage_flows(config)), *map(layer_group, names)}


def load_weights(diffuser: Diffuser, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by name. A layer group is given whole or not at all; missing groups keep their random start.

    Raises:
        ConfigError: see `check_weights`.
    """
    check_weights(diffuser, weights)
    own = diffuser.state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def check_weights(diffuser: Diffuser, weights: Mapping[str, Tensor]) -> None:
    """Compare names and shapes; reads no weights.

    Raises:
        ConfigError: a name or a shape is not the model's, or part of a layer group is missing.
    """
    own = diffuser.state_dict()
    given = {layer_group(name) for name in weights}
    expected = {name for name in own if layer_group(name) in given}
    for problem, names in (("unknown", weights.keys() - own.keys()), ("missing", expected - weights.keys())):
        if names:
            raise ConfigError(
                f"stage.init_from: {len(names)} {problem} weights, e.g. {min(names)}; is it the same model?"
            )
    for name, tensor in LazyTensors.of(weights).meta().items():
        if own[name].shape != tensor.shape:
            raise ConfigError(
                f"stage.init_from: {name} is {list(tensor.shape)}, here {list(own[name].shape)}; is it the same model?"
            )


def engine_settings(config: TrainConfig) -> EngineSettings:
    """The engine settings of a training configuration."""
    optimizer, hardware = config.optimizer, config.hardware
    first, second = optimizer.betas
    return EngineSettings(
        zero_stage=hardware.zero_stage,
        exchange=hardware.exchange,
        fused=hardware.compile != "none",
        precision=hardware.precision,
        gradient_clip=optimizer.gradient_clip,
        betas=(first, second),
        epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        gradient_scales=gradient_scales(config),
        gradient_scale_mode=config.stage.gradient_scale_mode,
    )


def initial_weights(start: Start, model: ModelConfig, verify_checksums: bool = True) -> Mapping[str, Tensor]:
    """A new stage's starting weights by name; empty if it resumes or starts at random.

    Args:
        verify_checksums: check every byte. False compares the sizes of the files.

    Raises:
        ConfigError: the weights are of a model with other sizes, or their folder is damaged.
        CheckpointError: a checkpoint is damaged.
    """
    if start.weights is None:
        return {}
    theirs = model_of(start.weights, "stage.init_from")
    if theirs.diffuser != model.diffuser:
        raise ConfigError(
            f"stage.init_from={start.weights}: its model has {theirs.diffuser}, this one has {model.diffuser}; "
            f"choose model={theirs.name}, or other weights"
        )
    if isinstance(start.weights, Path):
        return open_weights_folder(start.weights, "stage.init_from", hashed=verify_checksums)
    return checkpoint_weights(start.weights, verify_checksums=verify_checksums)
