"""DDIM sampling with classifier-free guidance, at the original's timesteps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vdtrain.compose import ConfigError
from vdtrain.diffusion.schedule import Schedule
from vdtrain.models.diffuser import Context, Diffuser, by_rows

# Predicts the noise in latents [B, ...] at one timestep.
NoisePredictor = Callable[[Tensor, int], Tensor]
Progress = Callable[[Sequence[int]], Sequence[int]]


def ddim_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """Uniform timesteps, rising, offset by one: 1, 21, ..., 981 for 50 steps of 1000.

    As in the original, a number that does not divide the schedule gives a few more than were asked for. A last one
    that would lie beyond the schedule, where the original fails, is left out.

    Raises:
        ConfigError: not between 1 and the schedule's own number of steps.
    """
    if not 1 <= steps <= schedule.steps:
        raise ConfigError(f"steps={steps}: choose 1 to {schedule.steps}")
    return list(range(1, schedule.steps, schedule.steps // steps))


def guided(diffuser: Diffuser, output: str, context: Context, unconditional: Tensor, scale: float) -> NoisePredictor:
    """Noise predictor with classifier-free guidance: unconditional + scale * (conditional - unconditional).

    Args:
        context: tokens [B, M, D].
        unconditional: tokens [B, M, D] of the same modality.
        scale: 1 leaves the unconditional pass out.
    """
    if scale == 1:
        route = by_rows([context])
        return lambda latents, timestep: diffuser.predict(output, latents, _filled(latents, timestep), route)
    route = by_rows([Context(context.modality, torch.cat([unconditional, context.tokens]))])

    def predict(latents: Tensor, timestep: int) -> Tensor:
        twice = torch.cat([latents, latents])
        without, given = diffuser.predict(output, twice, _filled(twice, timestep), route).chunk(2)
        return without + scale * (given - without)

    return predict


@torch.no_grad()
def ddim(
    predict: NoisePredictor,
    latents: Tensor,
    schedule: Schedule,
    steps: int,
    eta: float = 0.0,
    noises: Sequence[Tensor] | None = None,
    progress: Progress = list,
) -> Tensor:
    """Denoise `latents` [B, ...] ~ N(0, 1) (Song et al. 2021, equation 12).

    Args:
        eta: 0 is deterministic; above it, `noises` gives the unit noise of each step.
        progress: wraps the timesteps, e.g. in a progress bar.
    """
    timesteps = ddim_timesteps(schedule, steps)
    kept = schedule.alphas_cumprod.to(latents.device)
    # The last step lands on the first training timestep's variance, not on a noiseless one, as in the original.
    previous = [0, *timesteps[:-1]]
    for turn, index in enumerate(progress(range(len(timesteps) - 1, -1, -1))):
        now, after = kept[timesteps[index]], kept[previous[index]]
        noise = predict(latents, timesteps[index])
        sigma = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        clean = (latents - (1 - now).sqrt() * noise) / now.sqrt()
        latents = after.sqrt() * clean + (1 - after - sigma**2).sqrt() * noise
        if noises is not None:
            latents = latents + sigma * noises[turn]
    return latents


def _filled(latents: Tensor, timestep: int) -> Tensor:
    return torch.full((latents.shape[0],), timestep, device=latents.device, dtype=torch.long)
