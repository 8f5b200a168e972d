"""What a stage trains of the diffuser: the layer groups of its flows that are not frozen, or adapters in them.

Of an adapted layer (LoRA, Hu et al. 2021, arXiv 2106.09685) the weight W stays, and W + alpha / rank * B A computes.
The adapters are parametrisations of PyTorch: whatever reads a layer's weight reads the sum. Some layers here do not
call the layers below them but read their weights (`Attention`, `ContextLayer`, `PointwiseLinear`), so wrappers around
these layers, as peft makes them, would have no effect there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vdtrain.config.fields import shown
from vdtrain.config.schema import LoraConfig, TrainConfig
from vdtrain.config.validation import trained_groups
from vdtrain.errors import ConfigError
from vdtrain.models.diffuser import Diffuser, layer_group, parameters_by_group
from vdtrain.seeds import generator_of
from vdtrain.weights.tensor_files import Entry, LazyTensors

# Layers that multiply by a weight, with their subclasses.
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
# Between the name of a layer and that of a tensor, as PyTorch's parametrisations have it.
INSIDE = ".parametrizations.weight."
ORIGINAL, DOWN, UP = "original", "0.down", "0.up"


class LowRank(nn.Module):
    """W -> W + scale * up @ down; it changes nothing at first, because `up` is zero.

    Args:
        weight: W [n, ...], only for its shape and device.
        rank: at most the rank that W can have.
        generator: of the initial `down`, uniform as in the authors' code; on the CPU.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        rank, self.scale = min(rank, rows, columns), scale
        drawn = torch.rand(rank, columns, generator=generator, device="cpu")
        self.down = nn.Parameter(((2 * drawn - 1) * columns**-0.5).to(weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return low_rank_sum(weight, self.up, self.down, self.scale)


def low_rank_sum(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """weight [n, ...] + scale * up [n, r] @ down [r, m], in the shape of the weight."""
    return weight + scale * (up @ down).view_as(weight)


def scale_of(lora: LoraConfig) -> float:
    """The factor on the adapters."""
    return 1.0 if lora.rank is None or lora.alpha is None else lora.alpha / lora.rank


def add_adapters(diffuser: Diffuser, groups: Collection[str], lora: LoraConfig, seed: int) -> None:
    """Add an adapter to every linear layer and convolution of the layer groups that `lora.targets` allows.

    Each adapter has its own random stream, so that its initial values do not depend on the others.

    Raises:
        ConfigError: there is no such layer.
    """
    assert lora.rank is not None
    layers = list(_layers(diffuser, groups, lora.targets))
    if not layers:
        raise ConfigError(
            f"lora.targets={shown(lora.targets)}: no linear layer or convolution of {', '.join(groups)} has such a "
            "part in its name; name others, e.g. attn2, or leave it out"
        )
    for name, layer in layers:
        adapter = LowRank(layer.weight, lora.rank, scale_of(lora), generator_of(seed, "lora", name))
        parametrize.register_parametrization(layer, "weight", adapter)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    _, inside, part = name.partition(INSIDE)
    return bool(inside) and part != ORIGINAL


def merged(weights: LazyTensors, scale: float) -> LazyTensors:
    """Weights by the names of a model without adapters, with the adapters added; each is computed on access."""
    entries: dict[str, Entry] = {}
    for name, entry in weights.entries.items():
        layer, inside, part = name.partition(INSIDE)
        if not inside:
            entries[name] = entry
        elif part == ORIGINAL:
            parts = [entry, weights.entries[f"{layer}{INSIDE}{UP}"], weights.entries[f"{layer}{INSIDE}{DOWN}"]]
            entries[f"{layer}.weight"] = Entry(entry.shape, entry.dtype, partial(_sum, parts, scale))
    return LazyTensors(entries, weights.metadata)


def _sum(parts: list[Entry], scale: float) -> Tensor:
    weight, up, down = (part.read() for part in parts)
    return low_rank_sum(weight, up, down, scale)


def _layers(diffuser: Diffuser, groups: Collection[str], targets: Collection[str]) -> Iterator[tuple[str, Layer]]:
    for name, layer in diffuser.named_modules():
        chosen = not targets or any(f".{target}." in f".{name}." for target in targets)
        if chosen and isinstance(layer, Layer) and layer_group(f"{name}.weight") in groups:
            yield name, layer


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
