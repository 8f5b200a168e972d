"""The names of diffusers' U-Nets and the diffuser's own, both ways, derived from the layer plan.

diffusers keeps Versatile Diffusion in two U-Nets: `UNet2DConditionModel` with the image data layers and the image
context layers, and `UNetFlatConditionModel` with those of the text; each has its copy of the global layers as its time
embedding. Stable Diffusion's U-Net is the first of the two. A tensor has the same shape under either name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from vdtrain.config.schema import DiffuserConfig
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.models.layer_plan import NORM_EPSILON, ContextStep, LayerPlan, Role
from vdtrain.weights.tensor_files import LazyTensors, open_tensors

Kind = Literal["image", "flat"]
"""Of a U-Net: on images [B, C, H, W], or on latents without extent in space."""

MODEL_STEM = "diffusion_pytorch_model"
"""Of the weights files of diffusers' own classes."""
IMAGE_SIDE = 512
"""Pixels of an image where a pipeline's caller names no size."""
GLOBAL_LAYERS = {"0": "time_embedding.linear_1", "2": "time_embedding.linear_2"}
BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
BEHAVIOUR = {
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": NORM_EPSILON,
    "resnet_time_scale_shift": "default",
}
"""What a U-Net of this kind has in its configuration, where that says anything of it."""
LEAVE = {"0": "conv_norm_out", "2": "conv_out"}


class UnetNames:
    """The modules of one U-Net under both names.

    Args:
        plan: of the diffuser.
        kind: of the U-Net; only its layers between resolutions are named differently.
        data: the modality whose data layers it holds.
        context: the modality whose context layers it holds.
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
        self._own = {name: own for own, name in self._theirs.items()}

    def to_diffusers(self, name: str) -> str | None:
        """The U-Net's key of one of our parameter names; None for one that it does not hold."""
        return _translated(name, self._theirs)

    def to_own(self, key: str) -> str | None:
        """Our parameter name of a key of the U-Net; None for a key that it cannot have."""
        return _translated(key, self._own)

    def open(self, folder: Path, config: DiffuserConfig, setting: str) -> LazyTensors:
        """The tensors of a U-Net's folder, by our names.

        Args:
            folder: with the weights and their `config.json`.
            config: of the diffuser that takes them.
            setting: names where the folder comes from, in errors.

        Raises:
            WeightsError: the weights cannot be read, or there is one that has no place in the diffuser.
        """
        tensors = open_tensors(folder, setting)
        check_sizes(folder / "config.json", config, f"{setting}={folder}")
        names = {key: self.to_own(key) for key in tensors}
        if foreign := [key for key, name in names.items() if name is None]:
            raise WeightsError(f"{setting}={folder}: {foreign[0]} has no place in the model; is it of this kind?")
        return tensors.renamed({name: key for key, name in names.items() if name is not None})


def module_names(plan: LayerPlan) -> tuple[list[str], list[str]]:
    """diffusers' module names of the data layers and of the context layers, each in the order of the plan.

    The last data layer, which is two modules there, goes by "".
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
            name = "conv_in" if step.role is Role.ENTER else ""
        (context if isinstance(step, ContextStep) else data).append(name)
    return data, context


def _parts(role: Role, kind: Kind, name: str) -> Iterator[tuple[str, str]]:
    """The modules inside a data layer: ours below the layer, diffusers' in full."""
    if role is Role.BLOCK:
        yield from ((own, f"{name}.{theirs}") for own, theirs in BLOCK.items())
    elif role is Role.LEAVE:
        yield from LEAVE.items()
    elif role is Role.ENTER or kind == "flat":
        yield "", name
    else:
        yield ("op" if role is Role.DOWN else "conv"), f"{name}.conv"


def check_sizes(file: Path, config: DiffuserConfig, place: str) -> None:
    """Compare what the shapes of weights do not tell with a U-Net's `config.json`, where there is one.

    Raises:
        WeightsError: it is another network.
    """
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        # The number of heads goes by the name of their size, in configurations of these U-Nets; one, or one a level.
        heads = "num_attention_heads" if found.get("num_attention_heads") else "attention_head_dim"
        expected = {heads: config.heads, "norm_num_groups": config.norm_groups, **BEHAVIOUR}
        differing = [key for key, value in expected.items() if not _equal(found.get(key, value), value)]
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{place}: {file.name} is no JSON object; fetch it again") from error
    for key in differing:
        raise WeightsError(f"{place}: {key} is {found[key]} in {file.name}, and the model has {expected[key]}")


def _equal(found: object, value: object) -> bool:
    return all(each == value for each in found) if isinstance(found, list) and found else found == value


def _translated(name: str, modules: Mapping[str, str]) -> str | None:
    """A parameter's name with that of the module that it lies in replaced."""
    head, tail = name, ""
    while head:
        head, _, last = head.rpartition(".")
        tail = f"{last}.{tail}" if tail else last
        if head in modules:
            return f"{modules[head]}.{tail}"
    return None
