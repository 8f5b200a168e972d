"""Several contexts for one sample, mixed inside the network at every context position.

Versatile Diffusion, section 4.4 ("dual-context blender"), and the released code's two ways of mixing. Each context
layer adds a residual to its input, so a weighted mean of their outputs mixes the residuals alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vdtrain.diffusion.sampling import Mixing
from vdtrain.models.diffuser import Context, ContextRoute

MIXINGS = ("attention", "layer")


def normalised(ratios: Sequence[float]) -> list[float]:
    """Ratios that sum to 1.

    Raises:
        ValueError: a negative ratio, or none above 0.
    """
    if min(ratios, default=0) < 0 or sum(ratios) <= 0:
        raise ValueError(f"context weights {list(ratios)}: none may be negative, and one must be above 0")
    return [ratio / sum(ratios) for ratio in ratios]


def mixed(contexts: Sequence[Context], ratios: Sequence[float]) -> ContextRoute:
    """Attention mixing: every context is applied at every position, and the results are averaged by their ratios.

    Args:
        contexts: tokens [B, M, D] each, all of the same B.
        ratios: one per context; normalised to sum to 1.
    """
    shares = normalised(ratios)

    def route(layers: nn.ModuleDict, position: int, h: Tensor) -> Tensor:
        parts = [
            share * _applied(layers, position, h, context)
            for context, share in zip(contexts, shares, strict=True)
            if share > 0
        ]
        return torch.stack(parts).sum(dim=0)

    return route


def by_layer(contexts: Sequence[Context], choices: Sequence[int]) -> ContextRoute:
    """Layer mixing: each position is served by one context alone.

    Args:
        contexts: tokens [B, M, D] each, all of the same B.
        choices: index of the context that serves each position.
    """

    def route(layers: nn.ModuleDict, position: int, h: Tensor) -> Tensor:
        return _applied(layers, position, h, contexts[choices[position]])

    return route


def draw_choices(ratios: Sequence[float], positions: int, generator: torch.Generator) -> list[int]:
    """A context for each position, drawn with the probability of its ratio."""
    shares = torch.tensor(normalised(ratios))
    drawn: list[int] = torch.multinomial(shares, positions, replacement=True, generator=generator).tolist()
    return drawn


def make_mixing(name: str, ratios: Sequence[float], positions: int, seed: int) -> Mixing:
    """A mixing by name, for `guided`.

    Args:
        name: "attention" (`mixed`) or "layer" (`by_layer`, drawn anew at each timestep from a generator of its own).
        positions: number of context positions in the network.

    Raises:
        ValueError: another name, or impossible ratios.
    """
    shares = normalised(ratios)
    if name == "attention":
        return lambda contexts, timestep: mixed(contexts, shares)
    if name == "layer":
        return lambda contexts, timestep: by_layer(contexts, draw_choices(shares, positions, _drawer(seed, timestep)))
    raise ValueError(f"mixing={name}: choose one of {', '.join(MIXINGS)}")


def joined_by_modality(contexts: Sequence[Context], weights: Sequence[float]) -> tuple[list[Context], list[float]]:
    """One context per modality (see `joined`), and the sum of its weights; contexts of weight 0 are left out."""
    groups: dict[str, list[tuple[Context, float]]] = {}
    for context, weight in zip(contexts, weights, strict=True):
        if weight > 0:
            groups.setdefault(context.modality, []).append((context, weight))
    return (
        [joined([context for context, _ in group], [weight for _, weight in group]) for group in groups.values()],
        [sum(weight for _, weight in group) for group in groups.values()],
    )


def joined(contexts: Sequence[Context], weights: Sequence[float]) -> Context:
    """Contexts of one modality as one, tokens [B, M1 + M2 + ..., D], each scaled by its weight over their mean.

    The released application gives several pictures to the network in this way; equal weights leave all tokens as they
    are.
    """
    scales = [weight * len(weights) for weight in normalised(weights)]
    tokens = [context.tokens * scale for context, scale in zip(contexts, scales, strict=True)]
    return Context(contexts[0].modality, torch.cat(tokens, dim=1))


def _drawer(seed: int, timestep: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{timestep}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _applied(layers: nn.ModuleDict, position: int, h: Tensor, context: Context) -> Tensor:
    out: Tensor = cast(nn.ModuleList, layers[context.modality])[position](h, context.tokens)
    return out
