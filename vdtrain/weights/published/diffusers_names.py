"""diffusers' names of the diffuser's tensors, derived from the layer plan, and the diffuser in a diffusers folder.

diffusers keeps Versatile Diffusion in two U-Nets: `UNet2DConditionModel` with the image data layers and the image
context layers, and `UNetFlatConditionModel` with those of text. Each has a copy of the global layers as its time
embedding. Stable Diffusion's U-Net is like the first of the two. A tensor has the same shape under both names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, cast

import torch

from vdtrain.config.schema import DiffuserConfig, ModelConfig
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import Diffuser, layer_group
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.models.image_layers import ImageDataLayers
from vdtrain.models.layer_plan import ContextStep, LayerPlan, Role
from vdtrain.models.text_layers import FlatLinear, TextDataLayers
from vdtrain.weights.published.checks import check_diffuser, check_schedule, check_unet_config
from vdtrain.weights.tensor_files import LazyTensors, open_tensors

Kind = Literal["image", "flat"]
"""Of a U-Net: on images [B, C, H, W], or on latents without spatial dimensions."""

MODEL_STEM = "diffusion_pytorch_model"
"""Start of the names of diffusers' weights files."""
IMAGE_SIDE = 512
"""Default side of a pipeline's images, in pixels."""
FLAT_TOKENS = 4
"""The tokens that a text state is split into; a constant of the text U-Net's class."""
GLOBAL_LAYERS = {"0": "time_embedding.linear_1", "2": "time_embedding.linear_2"}
BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
CONV_OUT = {"0": "conv_norm_out", "2": "conv_out"}


class UnetNames:
    """The modules of one U-Net under both names.

    Args:
        plan: the diffuser's layers.
        kind: of the U-Net. The two kinds differ only in the names of the layers between resolutions.
        data: modality of its data layers.
        context: modality of its context layers.

    Attributes:
        own: our name of each module, by diffusers' name.
    """

    def __init__(self, plan: LayerPlan, kind: Kind, data: str, context: str) -> None:
        self.kind, self.data, self.context = kind, data, context
        self._theirs = {f"global_layers.{own}": name for own, name in GLOBAL_LAYERS.items()}
        data_names, context_names = module_names(plan)
        for index, (step, name) in enumerate(zip(plan.data_steps, data_names, strict=True)):
            for own, part in _parts(step.role, kind, name):
                self._theirs[".".join(filter(None, [f"data_layers.{data}.{index}", own]))] = part
        for index, name in enumerate(context_names):
            self._theirs[f"context_layers.{context}.{index}"] = name
        self.own = {name: own for own, name in self._theirs.items()}

    def to_diffusers(self, name: str) -> str | None:
        """The U-Net's key of one of our parameter names; None if the U-Net does not hold the parameter."""
        return translated(name, self._theirs)

    def to_own(self, key: str) -> str | None:
        """Our parameter name of one of the U-Net's keys; None if such a U-Net does not have the key."""
        return translated(key, self.own)

    def open(self, folder: Path, config: DiffuserConfig, setting: str) -> LazyTensors:
        """The tensors in a U-Net's folder, by our names.

        Args:
            folder: has the weights and their `config.json`.
            config: of the diffuser that takes the weights.
            setting: names where the folder comes from, in errors.

        Raises:
            WeightsError: the weights cannot be read, or one of them has no place in the diffuser.
        """
        tensors = open_tensors(folder, setting)
        check_unet_config(folder / "config.json", config, f"{setting}={folder}")
        names = {key: self.to_own(key) for key in tensors}
        if foreign := [key for key, name in names.items() if name is None]:
            raise WeightsError(f"{setting}={folder}: {foreign[0]} has no place in the model; is it of this kind?")
        return tensors.renamed({name: key for key, name in names.items() if name is not None})


def module_names(plan: LayerPlan) -> tuple[list[str], list[str]]:
    """diffusers' module names of the data layers and of the context layers, in the order of the plan.

    The last data layer is two modules in diffusers; its name here is "".
    """
    data: list[str] = []
    context: list[str] = []
    middle = plan.steps.index("load") - 3  # block, context, block stand before the first skip is loaded
    level, block = 0, -1
    for place, step in enumerate(plan.steps):
        if isinstance(step, str):
            continue
        side = "down" if place < middle else "up"
        if middle <= place < middle + 3:
            name = f"mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[place - middle]}"
            level, block = 0, -1
        elif isinstance(step, ContextStep):
            name = f"{side}_blocks.{level}.attentions.{block}"
        elif step.role is Role.BLOCK:
            block += 1
            name = f"{side}_blocks.{level}.resnets.{block}"
        elif step.role in (Role.DOWN, Role.UP):
            name = f"{side}_blocks.{level}.{side}samplers.0"
            level, block = level + 1, -1
        else:
            name = "conv_in" if step.role is Role.INPUT else ""
        (context if isinstance(step, ContextStep) else data).append(name)
    return data, context


def _parts(role: Role, kind: Kind, name: str) -> Iterator[tuple[str, str]]:
    """(our name below the layer, diffusers' full name) of the modules in a data layer."""
    if role is Role.BLOCK:
        yield from ((own, f"{name}.{theirs}") for own, theirs in BLOCK.items())
    elif role is Role.OUTPUT:
        yield from CONV_OUT.items()
    elif role is Role.INPUT or kind == "flat":
        yield "", name
    else:
        yield ("op" if role is Role.DOWN else "conv"), f"{name}.conv"


def translated(name: str, modules: Mapping[str, str]) -> str | None:
    """A parameter's name with the name of its module replaced; None if it is in none of the modules."""
    head, tail = name, ""
    while head:
        head, _, last = head.rpartition(".")
        tail = f"{last}.{tail}" if tail else last
        if head in modules:
            return f"{modules[head]}.{tail}"
    return None


def open_pipeline(folder: Path, model: ModelConfig, setting: str = "folder") -> LazyTensors:
    """The diffuser in a folder that `write_pipeline` or diffusers wrote, by our names; a tensor is read on access.

    Raises:
        WeightsError: the folder does not exist, or is of another model or noise schedule.
    """
    _, names_by_unet = unets(model)
    parts = {part: names.open(folder / part, model.diffuser, setting) for part, names in names_by_unet.items()}
    image, text = parts.values()
    for name in sorted(set(image) & set(text)):
        if not torch.equal(image[name], text[name]):
            raise WeightsError(
                f"{setting}={folder}: {names_by_unet['image_unet'].to_diffusers(name)} differs between image_unet and "
                "text_unet, which share their time embedding in Versatile Diffusion"
            )
    tensors = LazyTensors(text.entries | image.entries)
    check_whole(tensors, model, f"{setting}={folder}")
    check_schedule(LazyTensors({}), model.schedule, f"{setting}={folder}", folder, folder)
    return tensors


def unets(model: ModelConfig) -> tuple[Diffuser, dict[str, UnetNames]]:
    """The whole diffuser on the meta device, and the names in the two U-Nets that hold it: image_unet, text_unet.

    Raises:
        WeightsError: the model's modalities are not those of diffusers' pipelines.
    """
    with torch.device("meta"):
        diffuser = Diffuser(model, active_groups(all_flows(model.modalities)))
    found: dict[type, str] = {type(layers): name for name, layers in diffuser.data_layers.items()}
    if set(found) != {ImageDataLayers, TextDataLayers} or len(model.modalities) != 2:
        raise WeightsError(
            f"model.modalities={','.join(model.modalities)}: diffusers' pipelines have one modality with "
            "ImageDataLayers and one with TextDataLayers"
        )
    image, text = found[ImageDataLayers], found[TextDataLayers]
    tokens = cast(FlatLinear, cast(TextDataLayers, diffuser.data_layers[text])[0]).tokens
    if tokens != FLAT_TOKENS:
        raise WeightsError(f"model.modalities.{text}.data_layers.tokens={tokens}: diffusers has {FLAT_TOKENS}")
    return diffuser, {
        "image_unet": UnetNames(diffuser.plan, "image", image, image),
        "text_unet": UnetNames(diffuser.plan, "flat", text, text),
    }


def check_whole(tensors: LazyTensors, model: ModelConfig, place: str) -> None:
    """Check that tensors are the whole diffuser of a model.

    Raises:
        WeightsError: layers are missing, or the weights are of another model.
    """
    groups, present = active_groups(all_flows(model.modalities)), {layer_group(name) for name in tensors}
    if absent := [group for group in groups if group not in present]:
        raise WeightsError(f"{place}: no layers of {', '.join(absent)}; give weights of the last stage")
    check_diffuser(tensors, model, groups, place)
