"""The layout of the released `vd-four-flow-v1-0` weights (February 2023) and the diffuser's own names.

Released: `diffuser.image.time_embed.*`, `diffuser.<m>.data_blocks.<n>.0.*`, `diffuser.<m>.context_blocks.<n>.0.*`.
Ours: `global_layers.*`, `data_layers.<m>.<n>.*`, `context_layers.<m>.<n>.*`; what follows is the same in both.
"""

from __future__ import annotations

import re

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
