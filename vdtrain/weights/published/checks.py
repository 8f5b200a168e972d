"""Checks of published weights against the model's configuration: names and shapes, noise schedule, options of a U-Net.

The noise schedule, and what the weights predict, are found among the weights (twelve buffers, marks without values), in
a file's metadata, or in a file beside it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdtrain.config.schema import DiffuserConfig, ModelConfig, ScheduleConfig
from vdtrain.diffusion.schedule import Schedule
from vdtrain.files import read_json
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.frozen_weights import WeightsError, compare
from vdtrain.models.layer_plan import NORM_EPSILON
from vdtrain.weights.tensor_files import LazyTensors

# Half precision has 11 binary digits, and its smallest number is about 1e-7.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 2**-10, 1e-6
VELOCITY, ZERO_SNR = "predicts velocity (v-prediction)", "was trained on a noise schedule that ends in pure noise"
# Keys without a value that trainers add.
MARKS = {"v_pred": VELOCITY, "ztsnr": ZERO_SNR}
# Metadata of a safetensors file, and its meaning.
METADATA = {
    ("modelspec.prediction_type", "v"): VELOCITY,
    ("modelspec.prediction_type", "v_prediction"): VELOCITY,
    ("ss_zero_terminal_snr", "True"): ZERO_SNR,
}
SCHEDULER = "scheduler/scheduler_config.json"
# What such a U-Net has in its configuration, unless it leaves it out.
BEHAVIOUR = {
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": NORM_EPSILON,
    "resnet_time_scale_shift": "default",
}


def check_diffuser(tensors: LazyTensors, model: ModelConfig, groups: Collection[str], place: str) -> None:
    """Compare names and shapes with those of a model's layer groups.

    Raises:
        WeightsError: with the differences.
    """
    with torch.device("meta"):
        expected = Diffuser(model, groups).state_dict()
    if differences := compare(expected, tensors.meta()):
        raise WeightsError(f"{place}: weights of another model than model={model.name}: {differences}")


def schedule_buffers(config: ScheduleConfig) -> dict[str, Tensor]:
    """The buffers of a noise schedule by their released names, float64 [steps] each."""
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
    """Check the evidence in a file, or in a diffusers folder.

    Args:
        tensors: all tensors of the file.
        path: of the file. A recipe of the same name may be beside it.
        pipeline: a diffusers folder, with its scheduler's configuration.

    Raises:
        WeightsError: the weights have another noise schedule, or do not predict noise.
    """
    found = [(key, MARKS[key.rpartition(".")[2]]) for key in tensors if key.rpartition(".")[2] in MARKS]
    found += [(f"{key}={value}", text) for (key, value), text in METADATA.items() if tensors.metadata.get(key) == value]
    recipe = path.with_suffix(".yaml")
    if path.is_file() and recipe.is_file():
        text = recipe.read_text(encoding="utf-8", errors="replace")
        found += [(recipe.name, VELOCITY)] * bool(
            re.search(r"""^\s*parameterization:\s*["']?v\b""", text, re.MULTILINE)
        )
    for where, what in found:
        raise WeightsError(f"{place}: {where} shows that the network {what}, unlike this model; give other weights")
    if buffer := _other_buffer(tensors, config):
        raise WeightsError(f"{place}: {buffer} does not match {config}; set model.schedule to that of the weights")
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
    found = _configuration(file, SCHEDULER, place)
    for key, value in expected.items():
        if (other := found.get(key, value)) != value:
            remedy = "give other weights" + ", or set model.schedule" * key.startswith(("beta_", "num_"))
            raise WeightsError(f"{place}: {key} is {other} in {SCHEDULER}, and the model has {value}; {remedy}")


def _configuration(file: Path, name: str, place: str) -> dict[str, Any]:
    """The settings in a file of diffusers."""
    found = None
    with suppress(OSError, ValueError):
        found = read_json(file)
    if not isinstance(found, dict):
        raise WeightsError(f"{place}: {name} is not a JSON object; fetch it again")
    return found


def _other_buffer(found: Mapping[str, Tensor], config: ScheduleConfig) -> str | None:
    """The first buffer that does not match the configured schedule; None if all match."""
    buffers = schedule_buffers(config)
    for key in found:
        name = key.rpartition(".")[2]
        if name not in buffers:
            continue
        expected, given = buffers[name], found[key].double()
        # bfloat16 has 8 binary digits.
        relative = max(RELATIVE_TOLERANCE, torch.finfo(torch.bfloat16).eps * (found[key].dtype == torch.bfloat16))
        if given.shape != expected.shape or not torch.allclose(given, expected, rtol=relative, atol=ABSOLUTE_TOLERANCE):
            return key
    return None


def check_unet_config(file: Path, config: DiffuserConfig, place: str) -> None:
    """Compare a U-Net's `config.json`, if it exists, with the sizes and options that shapes of weights do not show.

    Raises:
        WeightsError: the U-Net is another network.
    """
    if not file.is_file():
        return
    found = _configuration(file, file.name, place)
    # These U-Nets keep the number of heads under the name of their size: one number, or a list by level.
    heads = "num_attention_heads" if found.get("num_attention_heads") else "attention_head_dim"
    for key, value in {heads: config.heads, "norm_num_groups": config.norm_groups, **BEHAVIOUR}.items():
        given = found.get(key, value)
        if any(each != value for each in given) if isinstance(given, list) and given else given != value:
            raise WeightsError(f"{place}: {key} is {given} in {file.name}, and the model has {value}")
