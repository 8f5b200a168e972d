"""The layout of Versatile Diffusion's first release (November 2022, `vd-official.pth`) and the diffuser's own names.

Released: `model.diffusion_model.time_embed.*`, and for every modality m `model.diffusion_model.unet_<m>.*`, numbered as
in Stable Diffusion: its data layers, and between them the context layers of the same modality. Ours: see
`versatile_diffusion_v1`, whose keys came with the second release.
"""

from __future__ import annotations

import re

from vdtrain.models.layer_plan import LayerPlan
from vdtrain.weights.stable_diffusion_v1 import UNET_PREFIX, own_names

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
