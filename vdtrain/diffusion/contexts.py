"""Semantic-style disentanglement: turning an image's context towards its content or towards its style.

Versatile Diffusion, section 4.3: the leading principal components of the local tokens carry what is in an image, the
others how it looks. The scale of a level follows the released application (February 2023), with an exact singular
value decomposition where that took a random approximation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vdtrain.diffusion.sampling import Mixing
from vdtrain.models.diffuser import Context, ContextRoute
from vdtrain.seeds import generator_of

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
        return lambda contexts, timestep: by_layer(
            contexts, draw_choices(shares, positions, generator_of(seed, timestep))
        )
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

    The released application gives several images to the network in this way; equal weights leave all tokens as they
    are.
    """
    scales = [weight * len(weights) for weight in normalised(weights)]
    tokens = [context.tokens * scale for context, scale in zip(contexts, scales, strict=True)]
    return Context(contexts[0].modality, torch.cat(tokens, dim=1))


def _applied(layers: nn.ModuleDict, position: int, h: Tensor, context: Context) -> Tensor:
    out: Tensor = cast(nn.ModuleList, layers[context.modality])[position](h, context.tokens)
    return out


# Components that a focus on content weakens, those that a focus on style leaves alone, and those that it keeps at all.
SEMANTIC_RANK = 2
STYLE_RANK = 5
KEPT_RANK = 20


def focus(tokens: Tensor, level: float) -> Tensor:
    """Move an image context between content and style.

    Args:
        tokens: [B, 1 + N, D], the global token first, which stays as it is.
        level: 0 keeps content alone, 0.5 changes nothing, 1 keeps style alone.

    Raises:
        ValueError: the level is not in 0..1.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"focus={level}: not in 0 (content) to 1 (style); 0.5 changes nothing")
    if level == 0.5:
        return tokens
    start, local = tokens[:, :1], tokens[:, 1:].float()
    mean = local.mean(dim=-1, keepdim=True)
    left, values, right = torch.linalg.svd(local - mean, full_matrices=False)
    factors = factors_of(level, values.shape[-1]).to(values)
    changed = (left * (values * factors)[:, None]) @ right + mean
    # The spread over tokens and channels stays what the network was trained with.
    changed = changed * (_spread(local) / _spread(changed).clamp_min(torch.finfo(local.dtype).tiny))
    return torch.cat([start, changed.to(tokens)], dim=1)


def low_rank(tokens: Tensor, rank: int) -> Tensor:
    """Tokens [B, N, D] with their `rank` leading components alone; the mean of each token stays."""
    mean = tokens.float().mean(dim=-1, keepdim=True)
    left, values, right = torch.linalg.svd(tokens.float() - mean, full_matrices=False)
    kept = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    restored: Tensor = kept + mean
    return restored.to(tokens)


def factors_of(level: float, rank: int) -> Tensor:
    """Factor on each of `rank` singular values, largest first, at a focus level."""
    factors = torch.ones(rank)
    if level < 0.5:
        base = _base(level, 0.0, SEMANTIC_RANK)
        for index in range(min(SEMANTIC_RANK, rank)):
            factors[index] = max(0.0, base + (1 - base) * index / SEMANTIC_RANK)
    else:
        weakened = KEPT_RANK - STYLE_RANK
        base = _base(level, 1.0, weakened + 1)
        for index in range(STYLE_RANK, min(KEPT_RANK, rank)):
            factors[index] = max(0.0, base + (1 - base) * (KEPT_RANK - 1 - index) / weakened)
        factors[KEPT_RANK:] = 0
    return factors


def _base(level: float, end: float, span: int) -> float:
    """1 at the neutral level, falling exponentially to 1 - span at the `end` of the scale."""

    def curve(at: float) -> float:
        return math.exp(2 * (at - 0.5))

    return 1 - span + span * (curve(level) - curve(end)) / (curve(0.5) - curve(end))


def _spread(tokens: Tensor) -> Tensor:
    return tokens.flatten(1).std(dim=1)[:, None, None]
