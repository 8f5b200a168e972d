"""How networks are executed: compiled, recomputed in the backward pass, or replayed from CUDA graphs.

Activation checkpointing is that of Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", by PyTorch's
non-reentrant checkpoints. Inductor compiles. `torch.cuda.make_graphed_callables` records CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vdtrain.models.diffuser import Context, Diffuser, DiffuserInput
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


# Makes a callable that replays a module's passes on tensors of the given form.
Recorder = Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]


def _cuda_graphs(module: nn.Module, tensors: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
    graphed: Any = torch.cuda.make_graphed_callables(module, tensors, allow_unused_input=True)
    return cast(Callable[..., tuple[Tensor, ...]], graphed)


def record_passes(diffuser: Diffuser, recorder: Recorder = _cuda_graphs) -> None:
    """Let a diffuser's training passes be recorded and replayed; call it after `compile_training`.

    A replay is one launch for the host. The weights must keep their memory.

    Args:
        recorder: records a module's forward and backward pass.
    """
    diffuser.forward = RecordedPasses(diffuser, recorder)  # type: ignore[method-assign]


def forget_passes(diffuser: nn.Module) -> None:
    """Free the recording, if there is one: the next training pass makes a new one."""
    if isinstance(passes := vars(diffuser).get("forward"), RecordedPasses):
        passes.forget()


@contextmanager
def plain_passes(diffuser: nn.Module) -> Iterator[None]:
    """Inside, nothing is replayed, so that each operation can be seen."""
    passes = vars(diffuser).get("forward")
    if isinstance(passes, RecordedPasses):
        diffuser.forward = passes.plain
    try:
        yield
    finally:
        if isinstance(passes, RecordedPasses):
            diffuser.forward = passes


class RecordedPasses:
    """A diffuser's forward that replays its passes on batches of one form, and runs them plainly on all others.

    The form is that of the first batch with gradients. A replay takes its inputs, its outputs and the gradients of the
    weights from the same memory each time: what one call returns is valid until the next.

    Attributes:
        plain: the forward without recordings.
    """

    def __init__(self, diffuser: Diffuser, recorder: Recorder) -> None:
        self.plain: Callable[[Sequence[DiffuserInput]], list[Tensor]] = diffuser.forward
        self._diffuser, self._recorder = diffuser, recorder
        self._form: object = None
        self._replay: Callable[..., tuple[Tensor, ...]] | None = None

    def __call__(self, inputs: Sequence[DiffuserInput]) -> list[Tensor]:
        if not torch.is_grad_enabled():
            return self.plain(inputs)
        tensors = _tensors(inputs)
        form = _routes(inputs), [(each.shape, each.stride(), each.dtype) for each in tensors]
        if self._replay is None:
            passes = _Passes(self._diffuser, self.plain, inputs)
            # The recording keeps these tensors, and every replay writes its inputs into them.
            self._replay = self._recorder(passes, tuple(each.detach().clone() for each in tensors))
            self._form = form
        return list(self._replay(*tensors)) if form == self._form else self.plain(inputs)

    def forget(self) -> None:
        self._replay = self._form = None


class _Passes(nn.Module):
    """A diffuser on the tensors of its inputs alone, as recorders need it; it has the diffuser's parameters."""

    def __init__(
        self,
        diffuser: Diffuser,
        forward: Callable[[Sequence[DiffuserInput]], list[Tensor]],
        like: Sequence[DiffuserInput],
    ) -> None:
        super().__init__()
        self.diffuser, self._forward = diffuser, forward
        self._routes = _routes(like)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        inputs = [
            DiffuserInput(output, next(given), next(given), [Context(modality, next(given)) for modality in modalities])
            for output, modalities in self._routes
        ]
        return tuple(self._forward(inputs))


def _routes(inputs: Sequence[DiffuserInput]) -> list[tuple[str, list[str]]]:
    """The output and the modalities of the contexts of each input."""
    return [(item.output, [context.modality for context in item.contexts]) for item in inputs]


def _tensors(inputs: Sequence[DiffuserInput]) -> list[Tensor]:
    """The tensors of the inputs, in the order in which `_Passes` takes them."""
    return [
        tensor
        for item in inputs
        for tensor in (item.latents, item.timesteps, *(context.tokens for context in item.contexts))
    ]
