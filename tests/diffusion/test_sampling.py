import pytest
import torch

from vdtrain.compose import ConfigError
from vdtrain.config import ScheduleConfig
from vdtrain.diffusion.sampling import ddim, ddim_timesteps
from vdtrain.diffusion.schedule import Schedule

SCHEDULE = Schedule(ScheduleConfig())


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 37, 50, 999, 1000])
def test_timesteps_rise_within_the_schedule(steps: int) -> None:
    timesteps = ddim_timesteps(SCHEDULE, steps)
    assert timesteps[0] == 1
    assert timesteps == sorted(set(timesteps))
    assert timesteps[-1] < SCHEDULE.steps
    assert len(timesteps) >= min(steps, SCHEDULE.steps - 1)


@pytest.mark.parametrize("steps", [0, -5, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=f"steps={steps}: choose 1 to 1000"):
        ddim_timesteps(SCHEDULE, steps)


@pytest.mark.parametrize("steps", [3, 50])
def test_a_perfect_predictor_leads_to_the_clean_latents(steps: int) -> None:
    """Predicting the noise that separates each state from known latents ends at those latents, nearly noiseless."""
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict(latents: torch.Tensor, timestep: int) -> torch.Tensor:
        kept = SCHEDULE.alphas_cumprod[timestep]
        return (latents - kept.sqrt() * clean) / (1 - kept).sqrt()

    start = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    out = ddim(predict, start, SCHEDULE, steps)
    kept = SCHEDULE.alphas_cumprod[0]
    assert float((out - kept.sqrt() * clean).std()) < 1.3 * float((1 - kept).sqrt())
