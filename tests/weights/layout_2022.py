"""Names of the first release (November 2022), to write files as they were published."""

from __future__ import annotations

from vdtrain.models.layer_plan import LayerPlan
from vdtrain.weights.published.diffusers_names import translated
from vdtrain.weights.published.versatile_diffusion import modules_2022


def to_2022(plan: LayerPlan, name: str) -> str:
    """The published key of one of our parameter names."""
    return str(translated(name, {own: theirs for theirs, own in modules_2022(plan, ("image", "text")).items()}))
