"""What a stage trains of the diffuser: the layer groups of its flows that are not frozen, or adapters in them."""

from __future__ import annotations

from torch import nn

from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import trained_groups
from vdtrain.models.diffuser import Diffuser, layer_group, parameters_by_group
from vdtrain.models.low_rank import add_adapters, is_adapter


def trained_parameters(diffuser: Diffuser, config: TrainConfig) -> dict[str, dict[str, nn.Parameter]]:
    """The trained parameters by layer group and name, in the engine's order. All others get no gradient from now on.

    With `lora.rank` this adds the adapters to the diffuser, and they are all that is trained.

    Raises:
        ConfigError: no layer is one of `lora.targets`.
    """
    groups, lora = trained_groups(config), config.lora
    if lora.rank is not None:
        add_adapters(diffuser, groups, lora, config.seed)
    for name, parameter in diffuser.named_parameters():
        trains = layer_group(name) in groups and (lora.rank is None or is_adapter(name))
        parameter.requires_grad_(trains)
    trained = parameters_by_group(diffuser, trained=True)
    return {group: trained[group] for group in groups if group in trained}
