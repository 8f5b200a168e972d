"""What the configuration says of the diffuser reaches the diffuser that is trained."""

from __future__ import annotations

import pytest
from torch import nn

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.training.build import starting_diffuser
from vdtrain.training.start import Start


@pytest.mark.parametrize(("mode", "data", "context"), [("none", 0, 0), ("context", 0, 1), ("blocks", 1, 1)])
def test_activation_checkpointing_reaches_the_layers(mode: str, data: int, context: int) -> None:
    overrides = ["model=tiny", "hardware=cpu", f"hardware.activation_checkpointing={mode}"]
    diffuser = starting_diffuser(to_object(compose("train", overrides), TrainConfig), Start())

    def share(layers: nn.ModuleDict) -> float:
        """Of the layers, those that are computed again in the backward pass."""
        chosen = ["forward" in vars(layer) for modality in layers.values() for layer in modality]
        return sum(chosen) / len(chosen)

    assert (share(diffuser.data_layers), share(diffuser.context_layers)) == (data, context)
