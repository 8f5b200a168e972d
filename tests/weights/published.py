"""The tiny model's weights as others publish them: Stable Diffusion's U-Net in CompVis' and in diffusers' layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.weights.small import MODEL, PLAN, weights
from vdtrain.config.schema import ScheduleConfig
from vdtrain.weights.published.checks import schedule_buffers
from vdtrain.weights.published.diffusers_names import UnetNames
from vdtrain.weights.published.stable_diffusion import UNET_PREFIX, layer_names

NAMES = UnetNames(PLAN, "image", "image", "image")


def compvis_unet(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The U-Net under CompVis' names, every tensor another one."""
    data, context = layer_names(PLAN)
    tensors = {}
    for name, tensor in weights(dtype).items():
        kind, _, rest = name.partition(".")
        if kind == "global_layers":
            tensors[f"{UNET_PREFIX}time_embed.{rest}"] = tensor
        elif rest.startswith("image."):
            _, index, tail = rest.split(".", 2)
            tensors[f"{UNET_PREFIX}{(data if kind == 'data_layers' else context)[int(index)]}.{tail}"] = tensor
    return tensors


def diffusers_unet(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same U-Net under diffusers' names."""
    theirs = {NAMES.to_diffusers(name): tensor for name, tensor in weights(dtype).items()}
    return {key: tensor for key, tensor in theirs.items() if key}


def compvis_whole(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All of CompVis' state dict: the U-Net, its average's counters, the other networks, the noise schedule."""
    buffers = {name: tensor.float() for name, tensor in schedule_buffers(ScheduleConfig()).items()}
    return {
        **buffers,
        "logvar": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5, dtype=torch.int32),
        "model_ema.diffusion_modeltime_embed0weight": torch.ones(2, 2),
        **compvis_unet(dtype),
        "first_stage_model.decoder.conv_in.weight": torch.ones(2, 2),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }


def expected_start(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What stage 1 starts from: global layers, image layers, and the attention as both contexts."""
    own = weights(dtype)
    return {
        name: own[name.replace("context_layers.text.", "context_layers.image.", 1)]
        for name in own
        if not name.startswith("data_layers.text.")
    }


def write_diffusers(
    folder: Path, dtype: torch.dtype = torch.float32, file: str = "diffusion_pytorch_model.safetensors"
) -> Path:
    """A folder of Stable Diffusion's pipeline: its U-Net with its configuration, and its scheduler's."""
    unet = folder / "unet"
    unet.mkdir(parents=True)
    (folder / "scheduler").mkdir()
    config = {"_class_name": "UNet2DConditionModel", "attention_head_dim": MODEL.diffuser.heads, "norm_num_groups": 8}
    (unet / "config.json").write_text(json.dumps(config))
    scheduler = {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    tensors = diffusers_unet(dtype)
    if file.endswith(".safetensors"):
        save_file(tensors, unet / file)
    else:
        torch.save(tensors, unet / file)
    return folder
