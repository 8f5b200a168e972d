"""Solvers with a perfect predictor: every path ends at the clean latents."""

import re

import pytest
import torch

from vdtrain.config.compose import ConfigError
from vdtrain.config.schema import ScheduleConfig
from vdtrain.diffusion.sampling import SOLVERS, ddim_timesteps, denoise, make_solver, spacing_note
from vdtrain.diffusion.schedule import Schedule

SCHEDULE = Schedule(ScheduleConfig())


def normal(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


CLEAN = normal(0)


def perfect(latents: torch.Tensor, timestep: int) -> torch.Tensor:
    """The noise in latents, from the known clean latents."""
    kept = SCHEDULE.alphas_cumprod[timestep]
    return (latents - kept.sqrt() * CLEAN) / (1 - kept).sqrt()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 37, 50, 999, 1000])
def test_timesteps_fall_within_the_schedule(steps: int) -> None:
    timesteps = ddim_timesteps(SCHEDULE, steps)
    assert timesteps[-1] == 1
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[0] < SCHEDULE.steps
    assert len(timesteps) >= min(steps, SCHEDULE.steps - 1)


@pytest.mark.parametrize("name", SOLVERS)
def test_what_a_number_of_steps_becomes_is_said(name: str) -> None:
    for steps in [*range(1, 60), 300, 500, 501, 999, 1000]:
        taken = len(make_solver(name, SCHEDULE, steps).timesteps)
        note = spacing_note(name, SCHEDULE, steps)
        assert (note is None) == (name != "ddim" or (SCHEDULE.steps % steps == 0 and taken == steps))
        if note is None:
            assert taken == steps
            continue
        assert f"takes {taken} steps" in note
        # The note's own proposals work.
        for other in re.findall(r"\d+", note.rpartition("; ")[2]):
            assert spacing_note(name, SCHEDULE, int(other)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: choose 1 to 1000"),
        ({"steps": 1001}, "steps=1001: choose 1 to 1000"),
        ({"name": "euler"}, "solver=euler: choose one of ddim, dpm-solver\\+\\+, unipc"),
        ({"eta": 2.0}, "eta=2.0: must be from 0"),
        ({"name": "unipc", "eta": 0.5}, "eta=0.5: only solver=ddim takes it"),
    ],
)
def test_impossible_solvers_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_solver(**{"name": "ddim", "schedule": SCHEDULE, "steps": 10, **settings})


@pytest.mark.parametrize("steps", [3, 50])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_perfect_predictor_leads_to_the_clean_latents(name: str, steps: int) -> None:
    out = denoise(perfect, normal(1), make_solver(name, SCHEDULE, steps))
    kept = SCHEDULE.alphas_cumprod[0]
    assert float((out - kept.sqrt() * CLEAN).std()) < 1.3 * float((1 - kept).sqrt())


@pytest.mark.parametrize("name", SOLVERS)
def test_a_later_start_takes_up_partly_noised_latents(name: str) -> None:
    solver = make_solver(name, SCHEDULE, 20)
    first = 14
    timesteps = torch.full((2,), solver.timesteps[first])
    visited = []

    def predict(latents: torch.Tensor, timestep: int) -> torch.Tensor:
        visited.append(timestep)
        return perfect(latents, timestep)

    out = denoise(predict, SCHEDULE.add_noise(CLEAN, normal(1), timesteps), solver, first)
    assert visited == solver.timesteps[first:]
    assert float((out - CLEAN).abs().max()) < 0.15


def test_eta_adds_the_given_noise() -> None:
    noises = torch.stack([normal(seed) for seed in range(2, 12)])
    still = denoise(perfect, normal(1), make_solver("ddim", SCHEDULE, 10))
    moved = denoise(perfect, normal(1), make_solver("ddim", SCHEDULE, 10, 1.0, lambda index: noises[index]))
    again = denoise(perfect, normal(1), make_solver("ddim", SCHEDULE, 10, 1.0, lambda index: noises[index]))
    assert torch.equal(moved, again)
    assert not torch.equal(moved, still)


def test_the_fast_solvers_need_fewer_steps() -> None:
    """For normal data with a known deviation, the path from noise to sample has a closed form."""
    deviation = 0.3

    def exact(latents: torch.Tensor, timestep: int) -> torch.Tensor:
        kept = SCHEDULE.alphas_cumprod[timestep]
        return (1 - kept).sqrt() * latents / (kept * deviation**2 + 1 - kept)

    errors = {}
    for name in SOLVERS:
        solver = make_solver(name, SCHEDULE, 12)
        kept = SCHEDULE.alphas_cumprod[solver.timesteps[0]]
        target = normal(1) * deviation / (kept * deviation**2 + 1 - kept).sqrt()
        errors[name] = float((denoise(exact, normal(1), solver) - target).abs().mean())
    assert errors["dpm-solver++"] < errors["ddim"] / 4
    assert errors["unipc"] < errors["ddim"] / 4
