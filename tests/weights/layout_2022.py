"""Names of the first release (November 2022), to write files as they were published."""

from __future__ import annotations

import re

from vdtrain.models.layer_plan import LayerPlan
from vdtrain.weights.stable_diffusion import UNET_PREFIX, compvis_key

LAYER = re.compile(r"(?:data|context)_layers\.([^.]+)\.")


def to_2022(plan: LayerPlan, name: str) -> str:
    """The published key of one of our parameter names."""
    match = LAYER.match(name)
    return f"{UNET_PREFIX}{f'unet_{match[1]}.' if match else ''}{compvis_key(plan, name)}"
