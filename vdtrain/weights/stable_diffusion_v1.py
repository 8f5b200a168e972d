"""Stable Diffusion v1.x in CompVis' layout as a starting point: what stage 1 inherits, and from where.

The U-Net's time embedding becomes the global layers, its residual and sampling layers the image data layers, and its
transformer blocks the context layers of every context modality: stage 1 trains the image's, and carries the text's
along for stage 2. Text data layers have no counterpart and start at random.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vdtrain.compose import ConfigError
from vdtrain.models.layer_plan import ContextStep, DataStep, LayerPlan, Role

UNET_PREFIX = "model.diffusion_model."
# The published sd-v1-4.ckpt keeps training state under this class.
LIGHTNING_CLASS = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class _Placeholder:
    """Stands for Lightning's class, so that the file can be read without it: nothing of it is run or kept."""


def layer_names(plan: LayerPlan) -> tuple[list[str], list[str]]:
    """CompVis' module names of the data layers and of the context layers, each in the order of the plan."""
    data: list[str] = []
    context: list[str] = []
    going_up = "load"
    middle = plan.steps.index(going_up) - 3  # block, context, block stand before the first skip is loaded
    block, part = -1, 0
    for place, step in enumerate(plan.steps):
        if isinstance(step, str):
            continue
        if middle <= place < middle + 3:
            name = f"middle_block.{place - middle}"
        elif isinstance(step, DataStep) and step.role is Role.LEAVE:
            name = "out"
        else:
            if place == middle + 4:
                block = -1
            # On the way down every data layer opens a block; on the way up only those that take a skip do.
            opens = isinstance(step, DataStep) and step.role is not Role.UP
            block, part = (block + 1, 0) if opens else (block, part + 1)
            name = f"{'input' if place < middle else 'output'}_blocks.{block}.{part}"
        (context if isinstance(step, ContextStep) else data).append(name)
    return data, context


def own_names(plan: LayerPlan, key: str, image: str, contexts: Collection[str]) -> list[str]:
    """Our parameter names that take the tensor of a U-Net key (without its prefix); empty if none does."""
    if key.startswith("time_embed."):
        return ["global_layers." + key.removeprefix("time_embed.")]
    data, context = layer_names(plan)
    for index, name in enumerate(data):
        if key.startswith(name + "."):
            return [f"data_layers.{image}.{index}.{key.removeprefix(name + '.')}"]
    for index, name in enumerate(context):
        if key.startswith(name + "."):
            tail = key.removeprefix(name + ".")
            return [f"context_layers.{modality}.{index}.{tail}" for modality in contexts]
    return []


def read_stable_diffusion(path: Path, plan: LayerPlan, image: str, contexts: Collection[str]) -> dict[str, Tensor]:
    """Weights by our names, float32, from a `.ckpt` or `.safetensors` file.

    Args:
        plan: of the model that takes them.
        image: name of the modality whose data layers they fill.
        contexts: names of the context modalities that start from the U-Net's attention.

    Raises:
        ConfigError: the file cannot be read without running code, or is no Stable Diffusion v1.
    """
    unet = {key.removeprefix(UNET_PREFIX): value for key, value in _read(path).items() if key.startswith(UNET_PREFIX)}
    if not unet:
        raise ConfigError(
            f"stage.init_from={path}: no keys below {UNET_PREFIX}; give Stable Diffusion v1 in CompVis' layout"
        )
    weights: dict[str, Tensor] = {}
    for key, value in unet.items():
        names = own_names(plan, key, image, contexts)
        if not names:
            raise ConfigError(
                f"stage.init_from={path}: {UNET_PREFIX}{key} has no place in the model; is it Stable Diffusion v1?"
            )
        weights |= {name: value.float() for name in names}
    return weights


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(_Placeholder, LIGHTNING_CLASS)]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"stage.init_from={path}: cannot be read as plain tensors ({reason}); convert it to safetensors"
        ) from error
    tensors: Mapping[str, Tensor] = content.get("state_dict", content)
    return tensors
