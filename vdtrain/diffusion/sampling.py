"""Sampling with classifier-free guidance, from one context or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vdtrain.diffusion.solvers import Solver
from vdtrain.models.diffuser import Context, ContextRoute, Diffuser, by_rows

# Predicts the noise in latents [B, ...] at one timestep.
NoisePredictor = Callable[[Tensor, int], Tensor]
# Wraps the indices of a loop, e.g. in a progress bar.
Progress = Callable[[Sequence[int]], Sequence[int]]
# The way of several contexts into the network at one timestep; all of them have the same B.
Mixing = Callable[[Sequence[Context], int], ContextRoute]


def alone(contexts: Sequence[Context], timestep: int) -> ContextRoute:
    """The mixing of a single context: none."""
    (context,) = contexts
    return by_rows([context])


def guided(
    diffuser: Diffuser,
    output: str,
    contexts: Sequence[Context],
    unconditional: Sequence[Context],
    scale: float,
    mixing: Mixing = alone,
) -> NoisePredictor:
    """Noise predictor with classifier-free guidance: unconditional + scale * (conditional - unconditional).

    Args:
        contexts: tokens [B, M, D] each.
        unconditional: one for each of `contexts`, of its modality and shape.
        scale: 1 leaves the unconditional pass out.
        mixing: how several contexts enter the network.

    Returns:
        A predictor of float32 noise, whatever the diffuser's precision.
    """
    if scale == 1:
        return lambda latents, timestep: _predict(diffuser, output, latents, timestep, mixing(contexts, timestep))
    doubled = [
        Context(given.modality, torch.cat([without.tokens, given.tokens]))
        for without, given in zip(unconditional, contexts, strict=True)
    ]

    def predict(latents: Tensor, timestep: int) -> Tensor:
        twice = torch.cat([latents, latents])
        route = mixing(doubled, timestep)
        without, given = _predict(diffuser, output, twice, timestep, route).chunk(2)
        return without + scale * (given - without)

    return predict


@torch.no_grad()
def denoise(
    predict: NoisePredictor, latents: Tensor, solver: Solver, first: int = 0, progress: Progress = list
) -> Tensor:
    """Take `latents` [B, ...] to the end of a solver's timesteps.

    Args:
        latents: unit normal, or samples noised to `solver.timesteps[first]`.
        first: index of the timestep to begin at.
    """
    solver.begin(first)
    for index in progress(range(first, len(solver.timesteps))):
        latents = solver.step(index, latents, predict(latents, solver.timesteps[index]))
    return latents


def _predict(diffuser: Diffuser, output: str, latents: Tensor, timestep: int, route: ContextRoute) -> Tensor:
    dtype = next(diffuser.parameters()).dtype
    timesteps = torch.full((latents.shape[0],), timestep, device=latents.device, dtype=torch.long)
    return diffuser.predict(output, latents.to(dtype), timesteps, route).float()
