"""The diffuser: one network of global, data and context layers; every flow has its own route through it.

Versatile Diffusion, section 3.2: a flow from context k to output o uses the global layers, the data layers of o and
the context layers of k. This module names no modality; the model's configuration lists each modality's layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vdtrain.config.instantiate import instantiate
from vdtrain.config.schema import ModelConfig
from vdtrain.flows import GLOBAL_GROUP
from vdtrain.models.layer_plan import ContextStep, DataStep, make_plan
from vdtrain.seeds import seed_of

# Applies a context position to the state: (context layers by modality, position, state) -> state.
ContextRoute = Callable[[nn.ModuleDict, int, Tensor], Tensor]


@dataclass(frozen=True)
class Context:
    """Context tokens [b, M, D] of one modality."""

    modality: str
    tokens: Tensor


@dataclass(frozen=True)
class DiffuserInput:
    """Noisy latents of one output modality, possibly of several flows.

    Attributes:
        output: the modality to generate.
        latents: [B, ...] noisy latents.
        timesteps: [B] integers.
        contexts: of consecutive rows of the batch, with b1 + b2 + ... = B rows.
    """

    output: str
    latents: Tensor
    timesteps: Tensor
    contexts: Sequence[Context]


class Diffuser(nn.Module):
    """Predicts the noise in latents of any output modality from contexts of any context modality.

    Args:
        config: widths, depths and the modalities' layers.
        groups: the layer groups to create, e.g. global, data.image, context.text.
        seed: of the initial weights. Each group has its own random stream, so its initial weights do not depend on the
            other groups.

    Attributes:
        channels_last: whether states [B, C, H, W] keep the channels of a pixel together in memory.
    """

    def __init__(self, config: ModelConfig, groups: Collection[str], seed: int = 0) -> None:
        super().__init__()
        self.channels_last = False
        self.plan = make_plan(config.diffuser)
        width, embedding_width = self.plan.time_width, self.plan.embedding_width
        with _seeded(seed, GLOBAL_GROUP):
            self.global_layers = nn.Sequential(
                nn.Linear(width, embedding_width), nn.SiLU(), nn.Linear(embedding_width, embedding_width)
            )
        self.data_layers = nn.ModuleDict()
        self.context_layers = nn.ModuleDict()
        for name, modality in config.modalities.items():
            for kind, specification, layers in (
                ("data", modality.data_layers, self.data_layers),
                ("context", modality.context_layers, self.context_layers),
            ):
                if f"{kind}.{name}" in groups:
                    with _seeded(seed, f"{kind}.{name}"):
                        setting = f"model.modalities.{name}.{kind}_layers"
                        layers[name] = instantiate(specification, setting, plan=self.plan)

    def forward(self, inputs: Sequence[DiffuserInput]) -> list[Tensor]:
        """Predicted noise for each input, in the shape of its latents."""
        return [self.predict(item.output, item.latents, item.timesteps, by_rows(item.contexts)) for item in inputs]

    def predict(self, output: str, latents: Tensor, timesteps: Tensor, route: ContextRoute) -> Tensor:
        """One pass: the noise [B, ...] in `latents` [B, ...] at `timesteps` [B]; `route` applies the contexts."""
        sinusoid = timestep_sinusoid(timesteps, self.plan.time_width).to(latents.dtype)
        embedding = self.global_layers(sinusoid)
        if self.channels_last and latents.ndim == 4:
            # All layers keep this order.
            latents = latents.contiguous(memory_format=torch.channels_last)
        data_layers = iter(cast(nn.ModuleList, self.data_layers[output]))
        h, skips, position = latents, [], 0
        for step in self.plan.steps:
            if isinstance(step, DataStep):
                h = next(data_layers)(h, embedding)
            elif isinstance(step, ContextStep):
                h = route(self.context_layers, position, h)
                position += 1
            elif step == "save":
                skips.append(h)
            else:
                h = torch.cat([h, skips.pop()], dim=1)
        return h


def by_rows(contexts: Sequence[Context]) -> ContextRoute:
    """Each context serves its own consecutive rows of the batch, so that flows can share data layers in one pass."""
    sizes = [context.tokens.shape[0] for context in contexts]

    def route(layers: nn.ModuleDict, position: int, h: Tensor) -> Tensor:
        rows = h.split(sizes) if len(sizes) > 1 else [h]
        parts = [
            cast(nn.ModuleList, layers[context.modality])[position](part, context.tokens)
            for part, context in zip(rows, contexts, strict=True)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return route


def timestep_sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """Timesteps [B] as [cos | sin] features [B, width], float32, frequencies 10000^(-i / (width / 2))."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def layer_group(parameter_name: str) -> str:
    """The layer group of a diffuser parameter: "data_layers.image.0.weight" belongs to "data.image"."""
    kind, modality = parameter_name.split(".")[:2]
    return GLOBAL_GROUP if kind == "global_layers" else f"{kind.removesuffix('_layers')}.{modality}"


def allocated(
    config: ModelConfig, groups: Collection[str], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Diffuser:
    """A diffuser whose state dict has no values yet: weights of a file will fill it.

    Buffers outside the state dict have the values that their layers computed.
    """
    with torch.device("meta"):
        diffuser = Diffuser(config, groups)
    kept = diffuser.state_dict().keys()
    if any(name not in kept for name, _ in diffuser.named_buffers()):
        return Diffuser(config, groups).to(device, dtype)
    return diffuser.to(dtype).to_empty(device=device)


def parameters_by_group(diffuser: nn.Module, trained: bool = False) -> dict[str, dict[str, nn.Parameter]]:
    """Layer group -> parameter name -> parameter.

    Args:
        trained: leave out parameters without gradient.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in diffuser.named_parameters():
        if parameter.requires_grad or not trained:
            groups.setdefault(layer_group(name), {})[name] = parameter
    return groups


@contextmanager
def _seeded(seed: int, group: str) -> Iterator[None]:
    """Draw initial weights from the group's own random stream; the global generator's state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, group))
        yield
