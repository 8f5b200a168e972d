"""The training engine: ZeRO 0, 1 and 2, float32 or bf16.

    for index, micro_batch in enumerate(micro_batches):
        loss = engine(micro_batch) / len(micro_batches)
        engine.backward(loss, last=index == len(micro_batches) - 1)
    report = engine.step(learning_rate)

A `Strategy` moves weights and gradients between processes. Norm, clipping, AdamW and the decision to skip a step are
the same for every strategy. None of them waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vdtrain.config.schema import DEEPSPEED, SHARDED, strategy_kind
from vdtrain.engine.adamw import FlatAdamW, FusedTargets, sum_of_squares
from vdtrain.engine.deepspeed import (
    LEARNING_RATE_MODE,
    EngineSettings,
)
from vdtrain.engine.flat import EMA, BufferReader, FlatStrategy, GroupLayout, Partition
from vdtrain.engine.strategies import ZeroStrategy
from vdtrain.errors import one_line
from vdtrain.run import distributed

# Elements that change places at a time.
PLACES = 1 << 24


def kept_share(number: Tensor, length: float, decay: float | None = None) -> Tensor:
    """The share of itself that an EMA keeps at updates `number`, counted from 1: float64, same shape.

    Args:
        length: mean age of the averaged weights after many updates, as a share of their number; in (0, 0.5].
        decay: upper limit of the result; the EMA then looks back over 1 / (1 - decay) updates. None sets no limit.
    """
    keep = (1 + number) / (1 / length + number)
    return keep if decay is None else torch.clamp(keep, max=decay)


class ShardEMA:
    """Exponential moving average of the master weights. It looks back further the more updates it has seen.

    See `kept_share`. After many updates its profile is a power law with the exponent 1 / length - 2
    (Karras et al. 2024, arXiv 2312.02696).

    Args:
        engine: its partitions are averaged; the EMA starts at their present values.
        length, decay: see `kept_share`.
    """

    def __init__(self, engine: Engine, decay: float | None = None, length: float = 0.1) -> None:
        if not 0.0 < length <= 0.5 or (decay is not None and not 0.0 <= decay < 1.0):
            raise ValueError(f"ema.length={length} is not in (0, 0.5], or ema.decay={decay} not in [0, 1)")
        self.decay, self.length = decay, length
        self._partitions = engine.partitions()
        self.buffers: list[Tensor] = [partition.master.clone() for partition in self._partitions]
        # On the device, which decides whether a step counts.
        device = self.buffers[0].device
        self._updates = torch.zeros((), dtype=torch.float64, device=device)
        self._always = torch.ones((), dtype=torch.bool, device=device)

    @property
    def updates(self) -> int:
        """Updates so far. Reading it waits for the device."""
        return int(self._updates.item())

    @torch.no_grad()
    def update(self, applied: Tensor | None = None) -> None:
        """Move the EMA towards the present weights. Call it after every step; it does not wait for the device.

        Args:
            applied: boolean scalar; if false, the EMA and its count keep every bit.
        """
        applied = self._always if applied is None else applied
        share = self.share(applied)
        for buffer, partition in zip(self.buffers, self._partitions, strict=True):
            buffer.lerp_(partition.master, share)
        self.count(applied)

    def share(self, applied: Tensor) -> Tensor:
        """How far the next update moves the EMA: float32 scalar, 0 if `applied` is false."""
        return torch.where(applied, 1 - kept_share(self._updates + 1, self.length, self.decay), 0.0).float()

    def count(self, applied: Tensor) -> None:
        """Count an update."""
        self._updates += applied

    @torch.no_grad()
    def restart(self) -> None:
        """Restart at the present weights."""
        for buffer, partition in zip(self.buffers, self._partitions, strict=True):
            buffer.copy_(partition.master)
        self._updates.zero_()

    @contextlib.contextmanager
    def shown(self, engine: Engine) -> Iterator[None]:
        """While the block runs, the module has the averaged weights; afterwards all is as before, to the bit.

        Masters and averages change places, so that no copy of the weights is needed. Every process must call it.
        """
        self._exchange(engine)
        engine.refresh_weights()
        yield
        # After an error the run ends, and the other processes may not be there to gather the weights again.
        self._exchange(engine)
        engine.refresh_weights()

    @torch.no_grad()
    def _exchange(self, engine: Engine) -> None:
        engine.settle()
        for buffer, partition in zip(self.buffers, self._partitions, strict=True):
            for average, master in zip(buffer.split(PLACES), partition.master.split(PLACES), strict=True):
                kept = average.clone()
                average.copy_(master)
                master.copy_(kept)

    @torch.no_grad()
    def load(self, read: BufferReader, updates: int) -> None:
        """Load this process's partitions through `read`."""
        for partition, buffer in zip(self._partitions, self.buffers, strict=True):
            buffer.copy_(read(partition.layout.group, EMA, partition.start, partition.stop))
        self._updates.fill_(updates)


@dataclass(frozen=True)
class StepReport:
    """Outcome of an optimiser step: scalars on the device, equal on every process. Reading them waits for the device.

    Attributes:
        gradient_norm: float64, global 2-norm after gradient scales and before clipping; infinite in a skipped step.
        applied: bool; false if a loss or a gradient was not finite. The step is then skipped: every process keeps its
            weights, moments and count of updates bit for bit.
        squares: float64 [groups, 3], this process's part of the sums of squares of each layer group's gradients (as in
            `gradient_norm`), weights and updates. The last two are 0 unless the step was asked to measure them.
    """

    gradient_norm: Tensor
    applied: Tensor
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.float64))


class Strategy(Protocol):
    """How weights and gradients travel between processes.

    Attributes:
        masters: the float32 weights, one flat buffer per layer group, padded at its end. A buffer is whole, or it is
            this process's partition.
    """

    masters: list[Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a loss, scaled by layer group; after a step's last loss, average over the processes."""

    def gradients(self) -> list[Tensor]:
        """The step's float32 gradients in the layout of the masters; the caller may overwrite them."""

    def zero_grad(self) -> None:
        """Clear the gradients for the next step."""

    def local_slice(self, start: int, stop: int) -> slice:
        """Where this process's partition, elements [start, stop) of a group, lies in its master."""

    def all_gather(self, buffers: Sequence[Tensor]) -> None:
        """All-gather each flat buffer from the ranks' partitions."""

    def lowered(self) -> Sequence[Tensor] | None:
        """This process's weights in the compute dtype, laid out as the masters; None if only `broadcast` writes."""

    def broadcast(self, written: bool = False) -> None:
        """Copy the masters into every process's module; they have arrived after `settle` or at the next forward.

        Args:
            written: the weights that `lowered` returned have the masters' values already.
        """

    def settle(self) -> None:
        """Wait for the module's weights; under NCCL the stream waits, not the host."""

    def close(self) -> None:
        """Release the module; it keeps its last weights."""


class Engine:
    """A module that all processes train together, with AdamW and one parameter group per layer group.

    Parameters outside the groups get no gradient and no optimiser state. Rank 0 keeps their float32 values in
    `carried_over` for later stages.

    Args:
        module: float32, with equal values on every process, on this process's device. The engine owns it: bf16
            converts it in place.
        groups: layer group -> parameter name -> parameter, for every trained group.
        settings: see EngineSettings.

    Raises:
        ValueError: the groups do not fit the module.
        RuntimeError: there is no process group, the processes have different weights, or DeepSpeed's memory layout is
            not that of the pinned version.
    """

    def __init__(
        self, module: nn.Module, groups: Mapping[str, Mapping[str, nn.Parameter]], settings: EngineSettings
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("the engine needs a process group: call vdtrain.run.distributed.start first")
        self._module, self._closed = module, False
        self.settings = settings
        trained = _checked_names(module, groups)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
        carried = {name: tensor for name, tensor in module.state_dict().items() if name not in trained}
        self.carried_over_names = frozenset(carried)
        self.carried_over: dict[str, Tensor] = {}
        if distributed.rank() == 0:
            self.carried_over = {name: tensor.detach().to("cpu", copy=True) for name, tensor in carried.items()}

        kind = strategy_kind(settings.zero_stage, settings.exchange, distributed.world_size())
        layouts = [GroupLayout.of(group, parameters, kind == DEEPSPEED) for group, parameters in groups.items()]
        self._strategy: Strategy
        if kind == DEEPSPEED:
            self._strategy = ZeroStrategy(module, groups, layouts, settings)
        else:
            self._strategy = FlatStrategy(module, groups, layouts, settings, sharded=kind == SHARDED)
        self._trained = {name: parameter for parameters in groups.values() for name, parameter in parameters.items()}
        self._addresses = [parameter.data_ptr() for parameter in self._trained.values()]
        self._optimizer = FlatAdamW(self._strategy.masters, settings)
        self._partitions = [self._partition(index, layout) for index, layout in enumerate(layouts)]
        self._scales = [float(settings.gradient_scales.get(group, 1.0)) for group in groups]
        # Of the step in progress: the sum of its losses, and whether the last one was added.
        self._losses = torch.zeros((), dtype=torch.float64, device=self._strategy.masters[0].device)
        self._gradients_begun = self._gradients_complete = False

    @property
    def module(self) -> nn.Module:
        """The module with its newest weights."""
        self.settle()
        return self._module

    def settle(self) -> None:
        """Wait for the module's weights, which are the masters' memory in float32."""
        if not self._closed:
            self._strategy.settle()

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the module's weights. Inputs must have it: they are not converted."""
        return self.settings.compute_dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        return self._strategy.forward(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's loss: a scalar, already divided by the number of micro-batches.

        Every process must run the same flows in the same order. `last` ends the accumulation and averages the gradients
        over the processes.

        Raises:
            RuntimeError: a trained parameter has left the engine's buffer since the engine was made.
        """
        if not self._gradients_begun:
            self._check_addresses()
        self._gradients_begun = True
        self._strategy.backward(loss, last)
        self._losses += loss.detach()
        self._gradients_complete = last

    @torch.no_grad()
    def step(self, learning_rate: float, measure: bool = False, ema: ShardEMA | None = None) -> StepReport:
        """Clip, update and broadcast the weights, or skip the step on all processes.

        Args:
            measure: also sum the squares of weights and updates, which reads them and the moments once more.
            ema: of this engine; it moves towards the new weights.
        """
        if not self._gradients_complete:
            raise RuntimeError("engine.step without engine.backward(loss, last=True) before it")
        gradients = self._strategy.gradients()
        report = self._examine(gradients)
        clip = self.settings.gradient_clip
        divisor = torch.ones_like(report.gradient_norm)
        if clip > 0:
            divisor = torch.clamp((report.gradient_norm + 1e-6) / clip, min=1.0)
        rates = list(self.rates(learning_rate).values())
        fused = self._update(gradients, rates, divisor, report.applied, ema)
        del gradients
        if measure:
            for index, (partition, rate) in enumerate(zip(self._partitions, rates, strict=True)):
                part = self._strategy.local_slice(partition.start, partition.stop)
                report.squares[index, 1:] = self._optimizer.measure(index, part, rate)
        # One process's pass has cleared all gradients; several hold more than their own.
        if not fused or distributed.world_size() > 1:
            self._strategy.zero_grad()
        self._strategy.broadcast(written=fused)
        self._losses.zero_()
        self._gradients_begun = self._gradients_complete = False
        return report

    def _update(
        self,
        gradients: Sequence[Tensor],
        rates: Sequence[float],
        divisor: Tensor,
        applied: Tensor,
        ema: ShardEMA | None,
    ) -> bool:
        """Update masters, moments and EMA; True if the weights in the compute dtype are written too."""
        # Compiled code runs eagerly while operations are counted, and would make temporary buffers as large as these.
        fused = self.settings.fused and not is_in_torch_dispatch_mode()
        weights = self._strategy.lowered() if fused else None
        if weights is None:
            self._optimizer.update(gradients, rates, divisor, applied)
            if ema is not None:
                ema.update(applied)
            return False
        averages = [None] * len(weights) if ema is None else ema.buffers
        share = torch.zeros_like(divisor) if ema is None else ema.share(applied)
        targets = FusedTargets(weights, averages, share, clear=distributed.world_size() == 1)
        self._optimizer.update_fused(gradients, rates, divisor, applied, targets)
        if ema is not None:
            ema.count(applied)
        return True

    @torch.no_grad()
    def prepare_step(self, ema: ShardEMA | None) -> None:
        """Let the compiler make what `step` runs, without any effect; there must be no gradients."""
        if self.settings.fused:
            device = self._losses.device
            never, one = torch.zeros((), dtype=torch.bool, device=device), torch.ones_like(self._losses)
            weights = self._strategy.lowered()
            if weights is not None:
                self._update(self._strategy.gradients(), [0.0] * len(weights), one, never, ema)

    @property
    def groups(self) -> list[str]:
        """Names of the trained layer groups, in order."""
        return [partition.layout.group for partition in self._partitions]

    def rates(self, learning_rate: float) -> dict[str, float]:
        """The learning rate of each layer group in a step at `learning_rate`."""
        by_rate = self.settings.gradient_scale_mode == LEARNING_RATE_MODE
        scales = self._scales if by_rate else [1.0] * len(self._scales)
        return {group: learning_rate * scale for group, scale in zip(self.groups, scales, strict=True)}

    def partitions(self) -> list[Partition]:
        """This process's partition of every layer group, in the order of the groups.

        They are the optimiser's own memory: call `refresh_weights` after writing to them.
        """
        return self._partitions

    @property
    def group_steps(self) -> dict[str, int]:
        """Updates applied so far to each layer group, for the bias correction. Reading them waits for the device."""
        return dict(zip(self.groups, self._optimizer.counts, strict=True))

    @torch.no_grad()
    def load_partitions(self, read: BufferReader, group_steps: Mapping[str, int]) -> None:
        """Load master weights and optimiser state through `read`, then refresh the weights; on every process.

        Args:
            group_steps: updates applied so far to each layer group.

        Raises:
            SharedError: on every process, if one of them cannot read.
        """
        failure = None
        try:
            for partition in self._partitions:
                for kind, buffer in partition.buffers.items():
                    buffer.copy_(read(partition.layout.group, kind, partition.start, partition.stop))
        except Exception as error:
            failure = one_line(error)
        # The slowest disk decides when the exchange begins.
        distributed.raise_if_any(failure)
        self._strategy.all_gather(self._optimizer.first_moments)
        self._strategy.all_gather(self._optimizer.second_moments)
        self._optimizer.counts = [group_steps[group] for group in self.groups]
        self.refresh_weights()

    @torch.no_grad()
    def load_carried_over(self, carried_over: Mapping[str, Tensor]) -> None:
        """Set every parameter that is not trained, on every process."""
        own = self.module.state_dict()
        for name, tensor in carried_over.items():
            own[name].copy_(tensor)
        if distributed.rank() == 0:
            self.carried_over = dict(carried_over)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Copy the master weights into every process's module; every process must call it."""
        self._strategy.all_gather(self._strategy.masters)
        self._strategy.broadcast()

    def close(self) -> None:
        """Release hooks, buffers and process groups; the module keeps its last weights."""
        self._strategy.close()
        self._closed = True
        del self._strategy, self._optimizer
        self._partitions = []

    def _partition(self, index: int, layout: GroupLayout) -> Partition:
        start, stop = layout.partition(distributed.rank(), distributed.world_size())
        part = self._strategy.local_slice(start, stop)
        optimizer = self._optimizer
        buffers = (optimizer.masters[index], optimizer.first_moments[index], optimizer.second_moments[index])
        return Partition(layout, start, stop, *(buffer[part] for buffer in buffers))

    def _check_addresses(self) -> None:
        """Whether every trained parameter still lies where the strategy put it.

        One that does not, for instance after `module.to(memory_format=...)`, would silently keep its values. In every
        step, because it takes 0.1 ms for 1,300 parameters and no wait for the device.
        """
        for (name, parameter), address in zip(self._trained.items(), self._addresses, strict=True):
            if parameter.data_ptr() != address:
                raise RuntimeError(
                    f"parameter {name} has left the engine's buffer, so training would not change it; "
                    "move or convert the module (device, type, memory format) before the engine is made"
                )

    def _examine(self, gradients: Sequence[Tensor]) -> StepReport:
        """The global gradient norm, and whether every loss and gradient was finite."""
        own = [
            gradient[self._strategy.local_slice(partition.start, partition.stop)]
            for gradient, partition in zip(gradients, self._partitions, strict=True)
        ]
        squares = torch.stack([sum_of_squares(part) for part in own])
        sums = torch.stack([squares.sum(), self._losses])
        if distributed.world_size() > 1:
            dist.all_reduce(sums)
        # Finite gradients whose squares overflow float32 would ruin the second moments.
        applied = torch.isfinite(sums.float()).all()
        kinds = torch.stack([squares, torch.zeros_like(squares), torch.zeros_like(squares)], dim=1)
        return StepReport(torch.where(applied, sums[0].sqrt(), torch.inf), applied, kinds)


def _checked_names(module: nn.Module, groups: Mapping[str, Mapping[str, nn.Parameter]]) -> set[str]:
    """Names of all grouped parameters, after checking them against the module."""
    own = dict(module.named_parameters())
    names: set[str] = set()
    for group, parameters in groups.items():
        if not parameters:
            raise ValueError(f"layer group {group!r} has no parameters")
        for name, parameter in parameters.items():
            if own.get(name) is not parameter or name in names:
                raise ValueError(
                    f"layer group {group!r}: {name!r} is not a parameter of the module, or is in two groups"
                )
            if parameter.dtype != torch.float32:
                raise ValueError(f"parameter {name!r} is {parameter.dtype}; the engine starts from float32 weights")
            names.add(name)
    if not names:
        raise ValueError("no layer group is trained; name at least one flow")
    return names
