"""The layout of the released `vd-four-flow-v1-0` weights (February 2023) and the diffuser's own names.

Released: `diffuser.image.time_embed.*`, `diffuser.<m>.data_blocks.<n>.0.*`, `diffuser.<m>.context_blocks.<n>.0.*`.
Ours: `global_layers.*`, `data_layers.<m>.<n>.*`, `context_layers.<m>.<n>.*`; what follows is the same in both.
"""

from __future__ import annotations

import re

from vdtrain.models.layer_plan import LayerPlan
from vdtrain.weights.stable_diffusion import UNET_PREFIX, own_names

UNET = re.compile(re.escape(UNET_PREFIX) + r"unet_([^.]+)\.(.+)")


def from_2022(plan: LayerPlan, key: str) -> str | None:
    """Our name of a key of the diffuser; None for one that it cannot have."""
    match = UNET.fullmatch(key)
    if match is None:
        # The global layers stand beside the networks of the modalities, in none of them.
        tail = key.removeprefix(UNET_PREFIX)
        return f"global_layers.{tail.removeprefix('time_embed.')}" if tail.startswith("time_embed.") else None
    modality, tail = match.groups()
    names = own_names(plan, tail, modality, [modality])
    return names[0] if names and not names[0].startswith("global_layers.") else None


GLOBAL_PREFIX = "diffuser.image.time_embed."
RELEASED_LAYER = re.compile(r"diffuser\.(\w+)\.(data|context)_blocks\.(\d+)\.0\.(.+)")
OWN_LAYER = re.compile(r"(data|context)_layers\.(\w+)\.(\d+)\.(.+)")


def from_released(key: str) -> str | None:
    """Our name of a released key; None for keys outside the diffuser (the schedule's buffers)."""
    if key.startswith(GLOBAL_PREFIX):
        return "global_layers." + key.removeprefix(GLOBAL_PREFIX)
    match = RELEASED_LAYER.fullmatch(key)
    if match is None:
        return None
    modality, kind, index, tail = match.groups()
    return f"{kind}_layers.{modality}.{index}.{tail}"


def to_released(name: str) -> str:
    """The released key of one of our parameter names.

    Raises:
        ValueError: the name is no diffuser parameter.
    """
    if name.startswith("global_layers."):
        return GLOBAL_PREFIX + name.removeprefix("global_layers.")
    match = OWN_LAYER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no parameter of the diffuser")
    kind, modality, index, tail = match.groups()
    return f"diffuser.{modality}.{kind}_blocks.{index}.0.{tail}"
