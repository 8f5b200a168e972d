"""How networks are executed: compiled, recomputed in the backward pass, or replayed from CUDA graphs.

Activation checkpointing is that of Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", by PyTorch's
non-reentrant checkpoints. Inductor compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vdtrain.errors import ConfigError, one_line, out_of_memory
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


# What is recorded, and what a recording gives: the memory of the results, and a function that computes them again.
Pass = Callable[[], Sequence[Tensor | None]]
Recorded = tuple[list[Tensor | None], Callable[[], object]]


class Tape(Protocol):
    """Records what functions compute, so that it can be computed again from the same memory into the same memory."""

    def rehearse(self, function: Callable[[], object]) -> None:
        """Call the function as it will be called to record it."""

    def record(self, function: Pass) -> Recorded:
        """Record a call of the function."""


class CudaTape:
    """Records CUDA graphs. `torch.cuda.make_graphed_callables` would do, but for the data's threads.

    They pin memory while a graph is captured, which that function forbids before PyTorch 2.14.
    """

    def __init__(self) -> None:
        # All graphs of a tape share them: the backward pass reads what the forward pass left.
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def rehearse(self, function: Callable[[], object]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Pass) -> Recorded:
        graph: Any = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                results = function()
        except RuntimeError as error:
            # What goes wrong in a capture lets its end fail too, and that error says nothing of the first.
            if isinstance(error.__context__, RuntimeError):
                raise error.__context__ from error
            raise
        return [None if each is None else each.detach() for each in results], graph.replay


# The first calls choose kernels and fill caches, which cannot be recorded.
REHEARSALS = 3


class Recording:
    """The forward and the backward pass of a module on tensors of one form. The parameters must keep their memory.

    Args:
        tensors: the inputs; every replay writes into them.
    """

    def __init__(self, module: nn.Module, tensors: Sequence[Tensor], tape: Tape) -> None:
        self.inputs, self.trained = list(tensors), [each for each in module.parameters() if each.requires_grad]
        found: tuple[Tensor, ...] = ()
        self.given: list[Tensor] = []

        def forward() -> tuple[Tensor, ...]:
            nonlocal found
            found = module(*self.inputs)
            return found

        def backward() -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(found, self.trained, self.given, allow_unused=True)

        def rehearsal() -> None:
            self.given = [torch.zeros_like(each) for each in forward()]
            backward()

        for _ in range(REHEARSALS):
            tape.rehearse(rehearsal)
        self.outputs, self.replay_forward = tape.record(forward)
        self.gradients, self.replay_backward = tape.record(backward)
        # They would keep the parameters' gradients on the stream of the recording.
        found = ()

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in memory that the next call overwrites; gradients flow back to the parameters alone."""
        found: tuple[Tensor, ...] = _Replay.apply(self, *given, *self.trained)
        return found


class _Replay(torch.autograd.Function):
    """Calls a recording."""

    @staticmethod
    def forward(context: Any, recording: Recording, *given: Tensor) -> tuple[Tensor | None, ...]:
        context.recording = recording
        for own, each in zip(recording.inputs, given[: len(recording.inputs)], strict=True):
            own.copy_(each)
        recording.replay_forward()
        return _views(recording.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        recording: Recording = context.recording
        for own, each in zip(recording.given, given, strict=True):
            own.copy_(each)
        recording.replay_backward()
        return (None, *[None] * len(recording.inputs), *_views(recording.gradients))


def _views(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if each is None else each.detach() for each in tensors)


def record_passes(diffuser: Diffuser, tape: Callable[[], Tape] = CudaTape) -> None:
    """Let a diffuser's training passes be recorded and replayed; call it after `compile_training`.

    A replay is one launch for the host. The weights must keep their memory.

    Args:
        tape: makes the tape of a recording.
    """
    diffuser.forward = RecordedPasses(diffuser, tape)  # type: ignore[method-assign]


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

    The form is that of the first batch with gradients. What one call returns is valid until the next.

    Attributes:
        plain: the forward without recordings.
    """

    def __init__(self, diffuser: Diffuser, tape: Callable[[], Tape]) -> None:
        self.plain: Callable[[Sequence[DiffuserInput]], list[Tensor]] = diffuser.forward
        self._diffuser, self._tape = diffuser, tape
        self._form: object = None
        self._recording: Recording | None = None

    def __call__(self, inputs: Sequence[DiffuserInput]) -> list[Tensor]:
        if not torch.is_grad_enabled():
            return self.plain(inputs)
        tensors = _tensors(inputs)
        form = _routes(inputs), [(each.shape, each.stride(), each.dtype) for each in tensors]
        if self._recording is None:
            passes = _Passes(self._diffuser, self.plain, inputs)
            try:
                self._recording = Recording(passes, [each.detach().clone() for each in tensors], self._tape())
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                # For instance a layer that waits for the device, or that draws and is recomputed.
                raise ConfigError(
                    f"hardware.cuda_graphs=true: the passes cannot be recorded: {one_line(error)}; choose false"
                ) from error
            self._form = form
        return list(self._recording(*tensors)) if form == self._form else self.plain(inputs)

    def forget(self) -> None:
        self._recording = self._form = None


class _Passes(nn.Module):
    """A diffuser on the tensors of its inputs alone, as a recording needs it; it has the diffuser's parameters."""

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
