"""What published weights say of their noise schedule and of what they predict: it must be what the model is built for.

It stands among the weights (twelve buffers, marks without values), in a file's notes, or in a file beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdtrain.config.schema import ScheduleConfig
from vdtrain.diffusion.schedule import Schedule
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights.tensor_files import LazyTensors

# Half precision keeps 11 binary digits of a number, and nothing below about 1e-7.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 2**-10, 1e-6
VELOCITY, ZERO_SNR = "predicts velocity (v-prediction)", "was trained on a noise schedule that ends in pure noise"
# Keys without a value that trainers set.
MARKS = {"v_pred": VELOCITY, "ztsnr": ZERO_SNR}
# Notes of a safetensors file, and what they say.
NOTES = {
    ("modelspec.prediction_type", "v"): VELOCITY,
    ("modelspec.prediction_type", "v_prediction"): VELOCITY,
    ("ss_zero_terminal_snr", "True"): ZERO_SNR,
}
SCHEDULER = "scheduler/scheduler_config.json"


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


def check_schedule(
    tensors: LazyTensors, config: ScheduleConfig, place: str, path: Path, pipeline: Path | None = None
) -> None:
    """Compare all that a file, or a pipeline's folder, says.

    Args:
        tensors: all of the file's.
        path: of the file; a recipe may lie beside it under the same name.
        pipeline: a folder of diffusers, with its scheduler's configuration.

    Raises:
        WeightsError: it is of another noise schedule, or predicts something else than noise.
    """
    said = [(key, MARKS[key.rpartition(".")[2]]) for key in tensors if key.rpartition(".")[2] in MARKS]
    said += [(f"{key}={value}", text) for (key, value), text in NOTES.items() if tensors.notes.get(key) == value]
    recipe = path.with_suffix(".yaml")
    if path.is_file() and recipe.is_file():
        text = recipe.read_text(encoding="utf-8", errors="replace")
        said += [(recipe.name, VELOCITY)] * bool(re.search(r"""^\s*parameterization:\s*["']?v\b""", text, re.MULTILINE))
    for where, what in said:
        raise WeightsError(f"{place}: {where} says that it {what}, and this model does not; take other weights")
    if buffer := disagreement(tensors, config):
        raise WeightsError(f"{place}: {buffer} is not that of {config}; set model.schedule to that of the weights")
    if pipeline is not None and (pipeline / SCHEDULER).is_file():
        _check_scheduler(pipeline / SCHEDULER, config, place)


def _check_scheduler(file: Path, config: ScheduleConfig, place: str) -> None:
    """Compare with the configuration of diffusers' scheduler."""
    expected: dict[str, Any] = {
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "trained_betas": None,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": config.steps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
    }
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        differing = [key for key, value in expected.items() if found.get(key, value) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{place}: {SCHEDULER} is no JSON object; fetch it again") from error
    for key in differing:
        raise WeightsError(
            f"{place}: {key} is {found[key]} in {SCHEDULER}, and the model has {expected[key]}; take other weights"
            + ", or set model.schedule" * (key not in ("prediction_type", "rescale_betas_zero_snr", "trained_betas"))
        )


def disagreement(found: Mapping[str, Tensor], config: ScheduleConfig) -> str | None:
    """The first buffer among `found` that is not of the configured schedule; None if there is none."""
    buffers = schedule_buffers(config)
    for key in found:
        name = key.rpartition(".")[2]
        if name not in buffers:
            continue
        expected, given = buffers[name], found[key].double()
        # Of bfloat16, 8 binary digits are left.
        relative = max(RELATIVE_TOLERANCE, torch.finfo(torch.bfloat16).eps * (found[key].dtype == torch.bfloat16))
        if given.shape != expected.shape or not torch.allclose(given, expected, rtol=relative, atol=ABSOLUTE_TOLERANCE):
            return key
    return None
