"""Compiles the blocks of networks with Inductor, and lays out image states with channels last."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from vdtrain.models.activation_checkpointing import Checkpointed, blocks
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.frozen import FrozenParts

MODES = ("none", "blocks", "whole")
# Compiled forms of one function: its inputs differ in resolution, context and modality. PyTorch's default is 8.
FORMS = 64


def compile_training(diffuser: Diffuser, frozen: FrozenParts, mode: str, backend: str = "inductor") -> None:
    """Compile what a training step runs, in place; the first call with each input shape compiles.

    Args:
        mode: one of MODES. `blocks` compiles every data and context layer; equal layers share their code. `whole`
            compiles the diffuser as one graph, which takes longer and saves the work between blocks. Both compile the
            blocks of the frozen encoders.
        backend: of torch.compile.

    Raises:
        ValueError: the mode is not one of MODES.
    """
    if mode not in MODES:
        raise ValueError(f"compile {mode!r}: choose one of {', '.join(MODES)}")
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
