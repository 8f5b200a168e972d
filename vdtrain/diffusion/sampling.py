"""Sampling with classifier-free guidance, from one context or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vdtrain.diffusion.schedule import Schedule
from vdtrain.errors import ConfigError
from vdtrain.models.diffuser import Context, ContextRoute, Diffuser, by_rows

# Unit normal noise in the shape of the latents, by the index of the step, from 0.
StepNoise = Callable[[int], Tensor]


class Solver(Protocol):
    """Denoises latents step by step with the predicted noise; every batch needs a new solver.

    Attributes:
        timesteps: of the noise predictions, in descending order.
    """

    timesteps: list[int]

    def begin(self, index: int) -> None:
        """Start at `timesteps[index]` instead of the first timestep."""

    def step(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        """The latents [B, ...] after `timesteps[index]`, from those before it and their predicted noise."""


def ddim_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """Uniform timesteps in descending order, offset by one: 981, ..., 21, 1 for 50 steps of 1000.

    As in the original, a number that does not divide the schedule gives a few more steps than that number. The original
    fails if the first timestep lies beyond the schedule; this function omits it.
    """
    return list(range(1, schedule.steps, schedule.steps // steps))[::-1]


def spacing_note(name: str, schedule: Schedule, steps: int) -> str | None:
    """A line for the user if the solver takes another number of steps than `steps`, else None.

    Args:
        name, steps: arguments that `make_solver` accepts. The solvers of diffusers take exactly `steps` steps.
    """
    if name != "ddim":
        return None
    total, timesteps = schedule.steps, ddim_timesteps(schedule, steps)
    if total % steps == 0 and len(timesteps) == steps:
        return None
    why = f"does not divide {total}" if total % steps else f"its first timestep would lie beyond {total - 1}"
    divisors = [each for each in range(1, total) if total % each == 0]
    below, above = (
        max(each for each in divisors if each <= steps),
        min((each for each in divisors if each > steps), default=None),
    )
    others = f"steps={below}" + (f" or {above}" if above else "")
    return (
        f"steps={steps}: {why}; solver=ddim takes {len(timesteps)} steps, at timesteps "
        f"{', '.join(map(str, timesteps[:2]))} ... {timesteps[-1]}; {others} is taken exactly"
    )


class DDIM:
    """Denoising diffusion implicit models (Song et al. 2021, equation 12), at the original's timesteps. See `Solver`.

    Args:
        eta: 0 is deterministic; above 0, `step_noise` gives the unit noise of each step.
    """

    def __init__(self, schedule: Schedule, steps: int, eta: float = 0.0, step_noise: StepNoise | None = None) -> None:
        self.timesteps = ddim_timesteps(schedule, steps)
        self.schedule, self.eta, self.step_noise = schedule, eta, step_noise

    def begin(self, index: int) -> None:
        """Nothing to do: a step does not depend on earlier ones."""

    def step(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        kept = self.schedule.alphas_cumprod.to(latents.device)
        # As in the original, the last step ends at the first training timestep's variance, not at zero noise.
        following = [*self.timesteps[1:], 0]
        now, after = kept[self.timesteps[index]], kept[following[index]]
        sigma = self.eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        clean = (latents - (1 - now).sqrt() * noise) / now.sqrt()
        latents = after.sqrt() * clean + (1 - after - sigma**2).sqrt() * noise
        return latents if self.step_noise is None else latents + sigma * self.step_noise(index)


class DiffusersSolver:
    """A scheduler of the diffusers package. See `Solver`."""

    def __init__(self, scheduler: Any, schedule: Schedule, steps: int, **settings: Any) -> None:
        self.scheduler = scheduler(
            num_train_timesteps=schedule.steps,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule="scaled_linear",
            # Small steps at the end: with an exactly known path they divide the error by ten (docs/log.md).
            use_karras_sigmas=True,
            **settings,
        )
        self.scheduler.set_timesteps(steps)
        self.timesteps: list[int] = self.scheduler.timesteps.tolist()

    def begin(self, index: int) -> None:
        self.scheduler.set_begin_index(index)

    def step(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        out: Tensor = self.scheduler.step(noise, self.timesteps[index], latents, return_dict=False)[0]
        return out


# diffusers' solvers and their settings: Lu et al. 2022 (DPM-Solver++, second order) and Zhao et al. 2023 (UniPC).
FAST_SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
SOLVERS = ("ddim", *FAST_SOLVERS)


def make_solver(
    name: str, schedule: Schedule, steps: int, eta: float = 0.0, step_noise: StepNoise | None = None
) -> Solver:
    """A solver by name, "ddim", "dpm-solver++" or "unipc".

    Raises:
        ConfigError: the name is unknown, the number of steps is impossible, or the solver has no `eta`.
    """
    if name not in SOLVERS:
        raise ConfigError(f"solver={name}: choose one of {', '.join(SOLVERS)}")
    if not 1 <= steps <= schedule.steps:
        raise ConfigError(f"steps={steps}: choose 1 to {schedule.steps}")
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta={eta}: must be from 0 (deterministic) to 1")
    if name == "ddim":
        return DDIM(schedule, steps, eta, step_noise if eta > 0 else None)
    if eta > 0:
        raise ConfigError(f"eta={eta}: only solver=ddim takes it; set eta=0 or solver=ddim")
    import diffusers

    scheduler, settings = FAST_SOLVERS[name]
    return DiffusersSolver(getattr(diffusers, scheduler), schedule, steps, **settings)


# Predicts the noise in latents [B, ...] at one timestep.
NoisePredictor = Callable[[Tensor, int], Tensor]
# Wraps the indices of a loop, e.g. in a progress bar.
Progress = Callable[[Sequence[int]], Iterable[int]]
# The route of several contexts through the network at one timestep; all contexts have the same B.
Mixing = Callable[[Sequence[Context], int], ContextRoute]


def alone(contexts: Sequence[Context], timestep: int) -> ContextRoute:
    """The mixing of a single context, which serves every position alone."""
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
    """A noise predictor with classifier-free guidance: unconditional + scale * (conditional - unconditional).

    Args:
        contexts: tokens [B, M, D] each.
        unconditional: one for each of `contexts`, with the same modality and shape.
        scale: 1 skips the unconditional pass.
        mixing: how several contexts enter the network.

    Returns:
        A predictor of float32 noise; the diffuser may have another precision.
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
    """Denoise `latents` [B, ...] through a solver's timesteps.

    Args:
        latents: unit normal, or samples noised to `solver.timesteps[first]`.
        first: index of the first timestep.
    """
    solver.begin(first)
    for index in progress(range(first, len(solver.timesteps))):
        latents = solver.step(index, latents, predict(latents, solver.timesteps[index]))
    return latents


def _predict(diffuser: Diffuser, output: str, latents: Tensor, timestep: int, route: ContextRoute) -> Tensor:
    dtype = next(diffuser.parameters()).dtype
    timesteps = torch.full((latents.shape[0],), timestep, device=latents.device, dtype=torch.long)
    return diffuser.predict(output, latents.to(dtype), timesteps, route).float()
