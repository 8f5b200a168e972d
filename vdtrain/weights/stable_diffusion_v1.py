"""Stable Diffusion v1.x in CompVis' layout as a starting point: what stage 1 inherits, and from where.

The U-Net's time embedding becomes the global layers, its residual and sampling layers the image data layers, and its
transformer blocks the context layers of every context modality: stage 1 trains the image's, and carries the text's
along for stage 2. Text data layers have no counterpart and start at random.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from vdtrain.config import ModelConfig
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.models.layer_plan import ContextStep, DataStep, LayerPlan, Role, make_plan
from vdtrain.weights.tensor_files import LazyTensors, open_tensors

UNET_PREFIX = "model.diffusion_model."


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


def open_stable_diffusion(path: Path, model: ModelConfig, contexts: Collection[str], setting: str) -> LazyTensors:
    """Stable Diffusion's U-Net by our names, each tensor read on access.

    Args:
        path: a `.ckpt` or `.safetensors` file. Of a file with an averaged copy (`model_ema.*`) the other one is taken.
        model: that takes the weights; its base modality's data layers and the global layers are filled.
        contexts: names of the context modalities that start from the U-Net's attention.
        setting: names where the path comes from, in errors.

    Raises:
        WeightsError: the file cannot be read without running code, or is no Stable Diffusion v1 of the model's sizes.
    """
    tensors = open_tensors(path, setting)
    unet = [key for key in tensors if key.startswith(UNET_PREFIX)]
    if not unet:
        raise WeightsError(
            f"{setting}={path}: no keys below {UNET_PREFIX}; give Stable Diffusion v1 in CompVis' layout"
        )
    plan = make_plan(model.diffuser)
    names: dict[str, str] = {}
    for key in unet:
        own = own_names(plan, key.removeprefix(UNET_PREFIX), model.base_modality, contexts)
        if not own:
            raise WeightsError(f"{setting}={path}: {key} has no place in the model; is it Stable Diffusion v1?")
        names |= dict.fromkeys(own, key)
    return tensors.renamed(names)
