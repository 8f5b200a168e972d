"""How the blocks of networks are executed: compiled, with channels last, or computed again in the backward pass.

Activation checkpointing is that of Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", by PyTorch's
non-reentrant checkpoints. Inductor compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vdtrain.models.diffuser import Diffuser
from vdtrain.models.frozen import FrozenParts

# Modules that draw no random numbers: these of PyTorch, and all of this package. A new modality's may have dropout.
DETERMINISTIC = {nn.Conv2d, nn.GroupNorm, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.Sequential, nn.SiLU}
OWN_LAYERS = f"{__package__}."


def checkpoint_activations(diffuser: Diffuser, mode: str) -> None:
    """Choose the blocks that the backward pass recomputes; a second call replaces the first.

    A checkpointed block keeps only its inputs from forward to backward. It draws the same random numbers again. Losses
    and gradients stay bit-identical if the kernels are deterministic. The layers of a modality need no code for this.

    Args:
        mode: "none"; "context", every context layer; or "blocks", every context layer and every data layer.
    """
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


# Compiled forms of one function: its inputs differ in resolution, context and modality. PyTorch's default is 8.
FORMS = 64


def compile_training(diffuser: Diffuser, frozen: FrozenParts, mode: str, backend: str = "inductor") -> None:
    """Compile what a training step runs, in place; the first call with each input shape compiles.

    Args:
        mode: "none"; "blocks" compiles every data and context layer, and equal layers share their code; "whole"
            compiles the diffuser as one graph, which takes longer and saves the work between blocks. Both compile
            the blocks of the frozen encoders.
        backend: of torch.compile.
    """
    if mode == "none":
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)
    if mode == "whole":
        compile_blocks([diffuser], backend)
    else:
        compile_blocks(blocks(diffuser.context_layers, diffuser.data_layers), backend)
    compile_blocks(frozen.blocks(), backend)


def compile_blocks(modules: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile the forward of each module in place; modules of one class with equal parameter shapes share it."""
    compiled: dict[Any, Callable[..., Any]] = {}
    for module in modules:
        kind = (type(module), *(parameter.shape for parameter in module.parameters()))
        if kind not in compiled:
            compiled[kind] = torch.compile(_copy(type(module).forward), dynamic=False, backend=backend)
        present = vars(module).get("forward")
        if isinstance(present, Checkpointed):
            present.function = compiled[kind]
        else:
            # The instance's attribute hides the class's method, so that parameters keep their names.
            module.forward = MethodType(compiled[kind], module)


def _copy(function: Any) -> FunctionType:
    """A copy with code of its own: the compiler tries all forms of one code object in turn, at every call."""
    copied = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
