"""The noise schedule among the released weights: twelve buffers that say what the configuration must say too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vdtrain.config import ScheduleConfig
from vdtrain.diffusion.schedule import Schedule

# Half precision keeps 11 binary digits of a number, and nothing below about 1e-7.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 2**-10, 1e-6


def schedule_buffers(config: ScheduleConfig) -> dict[str, Tensor]:
    """The buffers, float64 [steps] each, by their released names."""
    kept = Schedule(config).alphas_cumprod.double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    betas = 1 - kept / before
    posterior = betas * (1 - before) / (1 - kept)
    return {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - kept).log(),
        "sqrt_recip_alphas_cumprod": (1 / kept).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / kept - 1).sqrt(),
        "posterior_variance": posterior,
        "posterior_log_variance_clipped": posterior.clamp_min(1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - kept),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - kept),
    }


def disagreement(found: Mapping[str, Tensor], config: ScheduleConfig) -> str | None:
    """The first buffer among `found` that is not of the configured schedule; None if there is none."""
    for name, expected in schedule_buffers(config).items():
        if name not in found:
            continue
        given = found[name].double()
        if given.shape != expected.shape or not torch.allclose(
            given, expected, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE
        ):
            return name
    return None
