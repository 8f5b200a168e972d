"""What a stage's configuration makes: the diffuser with its first weights, and the engine's settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vdtrain.compose import ConfigError
from vdtrain.config import TrainConfig
from vdtrain.flows import active_groups
from vdtrain.models.attention import use_kernel
from vdtrain.models.diffuser import Diffuser, layer_group
from vdtrain.models.recompute import recompute_activations
from vdtrain.training.checkpoints import weight_names
from vdtrain.training.curriculum import Start, initial_weights
from vdtrain.training.engine_settings import EngineSettings
from vdtrain.validation import gradient_scales, stage_flows
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
