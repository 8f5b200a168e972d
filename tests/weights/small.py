"""The tiny model and a diffuser of it with weights of its own, for the tests of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.layer_plan import make_plan

MODEL: ModelConfig = to_object(compose("train", ["model=tiny"]), TrainConfig).model
PLAN = make_plan(MODEL.diffuser)
MODALITIES = ["image", "text"]
GROUPS = active_groups(all_flows(MODALITIES))


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """The whole diffuser by our names, every tensor at random."""
    with torch.device("meta"):
        outline = Diffuser(MODEL, GROUPS).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in outline.items()}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether names, dtypes and bits are equal."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )
