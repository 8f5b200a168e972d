"""Stable Diffusion v1.x as the start of stage 1, in CompVis' or in diffusers' layout.

The U-Net's time embedding becomes the global layers. Its residual and sampling layers become the image data layers. Its
transformer blocks become the context layers of every modality: stage 1 trains those of images and keeps those of text
for stage 2. Text data layers have no counterpart and start at random.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from vdtrain.config.schema import ModelConfig
from vdtrain.flows import GLOBAL_GROUP
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.models.layer_plan import ContextStep, DataStep, LayerPlan, Role, make_plan
from vdtrain.weights.published.checks import check_diffuser, check_schedule, check_unet_config
from vdtrain.weights.published.diffusers_names import UnetNames, translated
from vdtrain.weights.published.layouts import COMPVIS, DIFFUSERS, EMA_UNET, LEFTOVERS, VD_2022, contents, ema_name
from vdtrain.weights.tensor_files import LazyTensors, open_tensors

UNET_PREFIX = "model.diffusion_model."
# Input channels and context widths of the other networks of the family.
OTHER_CHANNELS = {7: "a network for upscaling", 8: "a network for editing or upscaling", 9: "a network for inpainting"}
OTHER_WIDTHS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}


def layer_names(plan: LayerPlan) -> tuple[list[str], list[str]]:
    """CompVis' module names of the data layers and of the context layers, in the order of the plan."""
    data: list[str] = []
    context: list[str] = []
    middle = plan.steps.index("load") - 3  # block, context, block stand before the first skip is loaded
    block, part = -1, 0
    for place, step in enumerate(plan.steps):
        if isinstance(step, str):
            continue
        if middle <= place < middle + 3:
            name = f"middle_block.{place - middle}"
        elif isinstance(step, DataStep) and step.role is Role.OUTPUT:
            name = "out"
        else:
            if place == middle + 4:
                block = -1
            # On the way down every data layer starts a block; on the way up only layers that take a skip do.
            opens = isinstance(step, DataStep) and step.role is not Role.UP
            block, part = (block + 1, 0) if opens else (block, part + 1)
            name = f"{'input' if place < middle else 'output'}_blocks.{block}.{part}"
        (context if isinstance(step, ContextStep) else data).append(name)
    return data, context


def compvis_modules(plan: LayerPlan, modality: str) -> dict[str, str]:
    """CompVis' name of each module of a U-Net by ours, which has the modality; for `translated`."""
    data, context = layer_names(plan)
    return {
        "global_layers": "time_embed",
        **{f"data_layers.{modality}.{index}": name for index, name in enumerate(data)},
        **{f"context_layers.{modality}.{index}": name for index, name in enumerate(context)},
    }


def open_stable_diffusion(path: Path, model: ModelConfig, contexts: Collection[str], setting: str) -> LazyTensors:
    """Stable Diffusion's U-Net by our names; a tensor is read on access.

    Args:
        path: CompVis' file, whole or only the U-Net; or diffusers' folder, its `unet/`, or the file in there. In a file
            with weights and their EMA copy (`model_ema.*`), the weights are read.
        model: takes the weights: in its global layers and the data layers of its base modality.
        contexts: modalities whose context layers start from the U-Net's attention.
        setting: names where the path comes from, in errors.

    Raises:
        WeightsError: the file cannot be read without running code, or is not Stable Diffusion v1 of the model's sizes.
    """
    place = f"{setting}={path}"
    folder = path / "unet" if (path / "unet").is_dir() else path
    tensors = open_tensors(folder, setting)
    unet = folder if folder.is_dir() else folder.parent
    keys = _own_names(tensors, model, place)
    if keys is None:
        raise WeightsError(
            f"{place}: no keys below {UNET_PREFIX} or of diffusers' U-Net; it holds {contents(tensors)}, and stage 1 "
            "starts from Stable Diffusion v1"
        )
    if DIFFUSERS.prefixes(tensors):
        check_unet_config(unet / "config.json", model.diffuser, f"{setting}={folder}")
    check_schedule(tensors, model.schedule, place, path, unet.parent if unet.name == "unet" else None)
    data = model.base_modality
    attention = f"context_layers.{data}."
    names = {name: key for name, key in keys.items() if not name.startswith(attention)}
    for context in contexts:
        names |= {
            name.replace(attention, f"context_layers.{context}."): key
            for name, key in keys.items()
            if name.startswith(attention)
        }
    found = tensors.renamed(names)
    groups = [GLOBAL_GROUP, f"data.{data}", *(f"context.{name}" for name in contexts)]
    check_diffuser(found, model, groups, place + _other_release(found, data))
    return found


def _own_names(tensors: LazyTensors, model: ModelConfig, place: str) -> dict[str, str] | None:
    """Our name, with the base modality's contexts -> the file's key; None if the file has no U-Net."""
    plan, data = make_plan(model.diffuser), model.base_modality
    if VD_2022.prefixes(tensors):
        return None
    if prefixes := COMPVIS.prefixes(tensors):
        modules = {theirs: own for own, theirs in compvis_modules(plan, data).items()}
    elif prefixes := DIFFUSERS.prefixes(tensors):
        modules = UnetNames(plan, "image", data, data).own
    elif EMA_UNET.prefixes(tensors):
        return _ema_names(tensors, model)
    else:
        return None
    prefix = prefixes[0]
    names = {}
    for key in tensors:
        tail = key.removeprefix(prefix)
        if key.startswith(prefix) and not tail.startswith(LEFTOVERS):
            if (name := translated(tail, modules)) is None:
                other = "label_emb." in key or "add_embedding." in key
                release = "it is Stable Diffusion XL, or takes image embeddings; " if other else ""
                raise WeightsError(f"{place}: {release}{key} has no place in the model; is it Stable Diffusion v1?")
            names[name] = key
    return names


def _ema_names(tensors: LazyTensors, model: ModelConfig) -> dict[str, str]:
    """The same for a file with only the EMA copy, whose keys have no dots."""
    data = model.base_modality
    modules = compvis_modules(make_plan(model.diffuser), data)
    with torch.device("meta"):
        expected = Diffuser(model, [GLOBAL_GROUP, f"data.{data}", f"context.{data}"]).state_dict()
    keys = {name: ema_name(f"{UNET_PREFIX}{translated(name, modules)}") for name in expected}
    return {name: key for name, key in keys.items() if key in tensors}


def _other_release(found: LazyTensors, data: str) -> str:
    """The name of another network of this family, for the error; "" if unknown."""
    first = found.entries.get(f"data_layers.{data}.0.weight")
    channels = 4 if first is None else first.shape[1]
    width = next((each.shape[-1] for name, each in found.entries.items() if name.endswith("attn2.to_k.weight")), 768)
    if channels in OTHER_CHANNELS:
        return f": it is {OTHER_CHANNELS[channels]}, with {channels} input channels; give the plain one"
    if width in OTHER_WIDTHS:
        return f": it is {OTHER_WIDTHS[width]}, with contexts {width} wide; give version 1"
    return ""
