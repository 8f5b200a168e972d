"""Operations on contexts: mixing several of them, and focus on the content or the style of an image.

Versatile Diffusion, section 4.3: the leading principal components of an image's local tokens carry its content, the
others its style. The scale of the focus level follows the released application (February 2023). That application
approximates the singular value decomposition at random; this module computes it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vdtrain.diffusion.sampling import Mixing
from vdtrain.errors import ConfigError
from vdtrain.models.diffuser import Context, ContextRoute
from vdtrain.seeds import generator_of

MIXINGS = ("attention", "layer")
# Leading components that a focus on content weakens.
SEMANTIC_RANK = 2
# A focus on style keeps the first STYLE_RANK components, weakens the next ones, and drops those after KEPT_RANK.
STYLE_RANK = 5
KEPT_RANK = 20


def normalised(ratios: Sequence[float]) -> list[float]:
    """The ratios, scaled to a sum of 1.

    Raises:
        ConfigError: a ratio is negative or not finite, or all are 0.
    """
    if min(ratios, default=0) < 0 or not 0 < sum(ratios) < math.inf:
        raise ConfigError(f"context weights {list(ratios)}: none may be negative or infinite, and one must be above 0")
    return [ratio / sum(ratios) for ratio in ratios]


def mixed(contexts: Sequence[Context], ratios: Sequence[float]) -> ContextRoute:
    """Attention mixing: every context is applied at every position; the result is their average, weighted by ratio.

    Args:
        contexts: tokens [B, M, D] each, all of the same B.
        ratios: one per context; only their proportions matter.
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
    """Layer mixing: a single context serves each position.

    Args:
        contexts: tokens [B, M, D] each, all of the same B.
        choices: index of the context that serves each position.
    """

    def route(layers: nn.ModuleDict, position: int, h: Tensor) -> Tensor:
        return _applied(layers, position, h, contexts[choices[position]])

    return route


def draw_choices(ratios: Sequence[float], positions: int, generator: torch.Generator) -> list[int]:
    """For each position the index of a context, drawn in proportion to the ratios."""
    shares = torch.tensor(normalised(ratios))
    drawn: list[int] = torch.multinomial(shares, positions, replacement=True, generator=generator).tolist()
    return drawn


def make_mixing(name: str, ratios: Sequence[float], positions: int, seed: int) -> Mixing:
    """A mixing by name, for `guided`.

    Args:
        name: "attention" (`mixed`) or "layer" (`by_layer`, with new choices at each timestep).
        positions: number of context positions in the network.
        seed: of the choices; each timestep has its own generator.

    Raises:
        ConfigError: the name is unknown, or the ratios are none; see `normalised`.
    """
    shares = normalised(ratios)
    if name == "attention":
        return lambda contexts, timestep: mixed(contexts, shares)
    if name == "layer":
        return lambda contexts, timestep: by_layer(
            contexts, draw_choices(shares, positions, generator_of(seed, timestep))
        )
    raise ConfigError(f"mixing={name}: choose one of {', '.join(MIXINGS)}")


def joined_by_modality(contexts: Sequence[Context], weights: Sequence[float]) -> tuple[list[Context], list[float]]:
    """One context per modality (see `joined`) and the sum of its weights; contexts of weight 0 are omitted."""
    groups: dict[str, list[tuple[Context, float]]] = {}
    for context, weight in zip(contexts, weights, strict=True):
        if weight > 0:
            groups.setdefault(context.modality, []).append((context, weight))
    return (
        [joined([context for context, _ in group], [weight for _, weight in group]) for group in groups.values()],
        [sum(weight for _, weight in group) for group in groups.values()],
    )


def joined(contexts: Sequence[Context], weights: Sequence[float]) -> Context:
    """Contexts of one modality as one, tokens [B, M1 + M2 + ..., D], each scaled by its weight over the mean weight.

    The released application combines several images in this way. Equal weights leave all tokens unchanged.
    """
    scales = [weight * len(weights) for weight in normalised(weights)]
    tokens = [context.tokens * scale for context, scale in zip(contexts, scales, strict=True)]
    return Context(contexts[0].modality, torch.cat(tokens, dim=1))


def _applied(layers: nn.ModuleDict, position: int, h: Tensor, context: Context) -> Tensor:
    out: Tensor = cast(nn.ModuleList, layers[context.modality])[position](h, context.tokens)
    return out


def check_focus(level: float) -> None:
    """Refuse a level that `focus` does not take.

    Raises:
        ConfigError: it is outside 0..1.
    """
    if not 0 <= level <= 1:
        raise ConfigError(f"focus={level}: must be from 0 (content) to 1 (style); 0.5 changes nothing")


def focus(tokens: Tensor, level: float) -> Tensor:
    """Move an image context between content and style.

    Args:
        tokens: [B, 1 + N, D]; the first is the global token, which does not change.
        level: 0 keeps only the content, 0.5 changes nothing, 1 keeps only the style.

    Raises:
        ConfigError: the level is outside 0..1.
    """
    check_focus(level)
    if level == 0.5:
        return tokens
    start, local = tokens[:, :1], tokens[:, 1:].float()
    mean = local.mean(dim=-1, keepdim=True)
    left, values, right = torch.linalg.svd(local - mean, full_matrices=False)
    factors = factors_of(level, values.shape[-1]).to(values)
    changed = (left * (values * factors)[:, None]) @ right + mean
    # The standard deviation over tokens and channels keeps the value that the network was trained with.
    changed = changed * (_spread(local) / _spread(changed).clamp_min(torch.finfo(local.dtype).tiny))
    return torch.cat([start, changed.to(tokens)], dim=1)


def low_rank(tokens: Tensor, rank: int) -> Tensor:
    """Tokens [B, N, D] reduced to their `rank` leading components; the mean of each token stays."""
    mean = tokens.float().mean(dim=-1, keepdim=True)
    left, values, right = torch.linalg.svd(tokens.float() - mean, full_matrices=False)
    kept = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    restored: Tensor = kept + mean
    return restored.to(tokens)


def factors_of(level: float, rank: int) -> Tensor:
    """The factors [rank] on the singular values, largest first, at a focus level."""
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
    """1 at the neutral level; falls exponentially to 1 - span at the `end` of the scale."""

    def curve(at: float) -> float:
        return math.exp(2 * (at - 0.5))

    return 1 - span + span * (curve(level) - curve(end)) / (curve(0.5) - curve(end))


def _spread(tokens: Tensor) -> Tensor:
    return tokens.flatten(1).std(dim=1)[:, None, None]
