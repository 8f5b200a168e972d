"""Published weights told by their keys: what a file holds, below which prefix, and which source imports it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from vdtrain.weights.tensor_files import LazyTensors

LISTED_KEYS = 3
# What training leaves beside the weights: an averaged copy, and numbers that follow from the configuration.
LEFTOVERS = ("model_ema.", "loss.", "lvlb_weights", "logvar", "scale_factor", "v_pred", "ztsnr")


@dataclass(frozen=True)
class Layout:
    """A kind of weights under one naming.

    Attributes:
        source: of `vdtrain weights import`; empty where none takes it.
        text: what it is, for people.
        marker: the end of a key that every such file has; what stands before it is a prefix of all keys.
        place: pattern of the prefixes that it can have.
    """

    source: str
    text: str
    marker: str
    place: str = r"(.*\.)?"

    def prefixes(self, keys: Iterable[str]) -> list[str]:
        """What stands before the marker: rather not of an averaged copy, and the shortest first."""
        found = [key.removesuffix(self.marker) for key in keys if key.endswith(self.marker)]
        whole = [prefix for prefix in found if re.fullmatch(self.place, prefix)]
        return sorted(whole, key=lambda prefix: ("ema." in prefix, len(prefix)))


VD_2023 = Layout("versatile_diffusion", "Versatile Diffusion (2023)", "diffuser.image.time_embed.0.weight")
VD_2022 = Layout(
    "versatile_diffusion",
    "Versatile Diffusion (2022)",
    "model.diffusion_model.unet_image.input_blocks.0.0.weight",
)
# Alone or in the whole model, and not what steers it, which has the same layers.
COMPVIS = Layout(
    "stable_diffusion", "Stable Diffusion's U-Net", "input_blocks.0.0.weight", r"((.*\.)?diffusion_model\.)?"
)
AVERAGED = Layout(
    "stable_diffusion",
    "Stable Diffusion's averaged U-Net",
    "model_ema.diffusion_modelinput_blocks00weight",
)
DIFFUSERS = Layout("stable_diffusion", "Stable Diffusion's U-Net by diffusers", "time_embedding.linear_1.weight")
IMAGE_VAE = Layout("image_vae", "the image VAE", "decoder.conv_in.weight")
TEXT_VAE = Layout("text_vae", "the text VAE", "decoder.transformer.wpe.weight")
CLIP = Layout("clip", "CLIP", "vision_model.embeddings.class_embedding")
OPEN_CLIP = Layout("clip", "CLIP by open_clip", "visual.class_embedding")
LAYOUTS = (VD_2023, VD_2022, COMPVIS, DIFFUSERS, AVERAGED, IMAGE_VAE, TEXT_VAE, CLIP, OPEN_CLIP)


def recognised(keys: Iterable[str]) -> list[Layout]:
    """The layouts that a file's keys are of, the one that it was published as first."""
    names = list(keys)
    return [layout for layout in LAYOUTS if layout.prefixes(names)]


def contents(keys: Iterable[str]) -> str:
    """What a file holds, in a few words."""
    names = list(keys)
    if layouts := recognised(names):
        return ", ".join(f"{layout.text} (`vdtrain weights import {layout.source}`)" for layout in layouts)
    listed = ", ".join(name[:80] for name in names[:LISTED_KEYS])
    return f"{len(names)} tensors such as {listed}" if names else "no tensors"


def below(tensors: Mapping[str, Tensor], prefix: str) -> LazyTensors:
    """The tensors below a prefix, without it, and without what training leaves beside weights."""
    keys = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    return LazyTensors.of(tensors).renamed({name: key for name, key in keys.items() if not name.startswith(LEFTOVERS)})


def averaged_name(key: str) -> str:
    """The name of a weight's averaged copy, which CompVis' code keeps without dots."""
    return "model_ema." + re.sub(r"^model\.", "", key).replace(".", "")
