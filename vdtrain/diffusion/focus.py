"""Semantic-style disentanglement: turning a picture's context towards its content or towards its style.

Versatile Diffusion, section 4.3: the leading principal components of the local tokens carry what is in a picture, the
others how it looks. The scale of a level follows the released application (February 2023), with an exact singular
value decomposition where that took a random approximation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
