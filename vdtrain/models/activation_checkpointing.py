"""Activation checkpointing: the backward pass recomputes the activations of chosen blocks instead of keeping them.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", with PyTorch's non-reentrant checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from vdtrain.models.diffuser import Diffuser

# Checkpointed blocks: no block; every context layer; every context layer and every data layer.
MODES = ("none", "context", "blocks")
# Modules that draw no random numbers: these of PyTorch, and all of this package. A new modality's may have dropout.
DETERMINISTIC = {nn.Conv2d, nn.GroupNorm, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.Sequential, nn.SiLU}
OWN_LAYERS = f"{__package__}."


def checkpoint_activations(diffuser: Diffuser, mode: str) -> None:
    """Choose the blocks that the backward pass recomputes; a second call replaces the first.

    A checkpointed block keeps only its inputs from forward to backward. It draws the same random numbers again. Losses
    and gradients stay bit-identical if the kernels are deterministic. The layers of a modality need no code for this.

    Args:
        mode: one of MODES.

    Raises:
        ValueError: the mode is not one of MODES.
    """
    if mode not in MODES:
        raise ValueError(f"activation checkpointing {mode!r}: choose one of {', '.join(MODES)}")
    chosen = {
        "none": (),
        "context": (diffuser.context_layers,),
        "blocks": (diffuser.context_layers, diffuser.data_layers),
    }
    for block in blocks(diffuser.context_layers, diffuser.data_layers):
        vars(block).pop("forward", None)
    for block in blocks(*chosen[mode]):
        # The instance's attribute hides the class's method, so that parameters keep their names.
        block.forward = Checkpointed(block)


def blocks(*layers: nn.ModuleDict) -> Iterator[nn.Module]:
    """Every layer of the given kinds, over all modalities."""
    for by_modality in layers:
        for blocks in by_modality.values():
            yield from cast(nn.ModuleList, blocks)


class Checkpointed:
    """A block's forward that keeps no activations. It is a class, so that a copied model refers to its own blocks.

    Attributes:
        function: the forward, a function of the block and its inputs.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.function: Callable[..., object] = type(block).forward
        # A generator's state cannot be read while a CUDA graph is captured.
        self.draws = any(_may_draw(module) for module in block.modules())

    def __call__(self, *inputs: object) -> object:
        return checkpoint(self.function, self.block, *inputs, use_reentrant=False, preserve_rng_state=self.draws)


def _may_draw(module: nn.Module) -> bool:
    return type(module) not in DETERMINISTIC and not type(module).__module__.startswith(OWN_LAYERS)
