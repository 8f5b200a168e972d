"""Activation checkpointing: blocks whose activations are computed again in the backward pass instead of being kept.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", with PyTorch's non-reentrant checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from vdtrain.models.diffuser import Diffuser

# What is computed again: nothing; every context layer; every context layer and every data layer.
MODES = ("none", "context", "blocks")


def checkpoint_activations(diffuser: Diffuser, mode: str) -> None:
    """Choose what the backward pass computes again; a second call replaces the first.

    Of a block that is computed again, only its inputs are kept from forward to backward. Losses and gradients stay the
    same to the last bit wherever a kernel gives the same result twice, and random numbers that a block draws are drawn
    again as they were. The layers themselves, which any modality may bring, know nothing of it.

    Args:
        mode: one of MODES.

    Raises:
        ValueError: no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"activation checkpointing {mode!r}: choose one of {', '.join(MODES)}")
    chosen = {
        "none": (),
        "context": (diffuser.context_layers,),
        "blocks": (diffuser.context_layers, diffuser.data_layers),
    }
    for block in _blocks(diffuser.context_layers, diffuser.data_layers):
        vars(block).pop("forward", None)
    for block in _blocks(*chosen[mode]):
        # On the instance, over its class's own: parameters keep their names.
        block.forward = _Checkpointed(block)


def _blocks(*layers: nn.ModuleDict) -> Iterator[nn.Module]:
    for by_modality in layers:
        for blocks in by_modality.values():
            yield from cast(nn.ModuleList, blocks)


class _Checkpointed:
    """A block's forward without its activations; a class, so that copies of the model are wholes of their own."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *inputs: object) -> object:
        return checkpoint(type(self.block).forward, self.block, *inputs, use_reentrant=False, preserve_rng_state=True)
