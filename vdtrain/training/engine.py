"""The DeepSpeed ZeRO engine behind a small, typed face.

    for index, micro_batch in enumerate(micro_batches):
        loss = engine(micro_batch) / len(micro_batches)
        engine.backward(loss, last=index == len(micro_batches) - 1)
    report = engine.step(learning_rate)

Everything that DeepSpeed keeps private is read here and nowhere else.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdtrain.training import distributed
from vdtrain.training.deepspeed_import import DEEPSPEED_VERSION, import_deepspeed
from vdtrain.training.engine_settings import GRADIENT_MODE, LEARNING_RATE_MODE, EngineSettings, deepspeed_configuration
from vdtrain.training.partitions import FIRST_MOMENT, MASTER, SECOND_MOMENT, GroupLayout, Partition, RowReader, cut

__all__ = ["Engine", "EngineSettings", "StepReport"]

# ZeRO 1 and 2 keep this process's flat float32 weights under the first name; the bf16 optimiser that DeepSpeed
# takes for ZeRO 1 with float32 accumulation, under the second.
MASTER_ATTRIBUTES = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")


@dataclass(frozen=True)
class StepReport:
    """What an optimiser step did.

    Attributes:
        gradient_norm: global 2-norm after gradient scales and before clipping; infinite if it was not finite.
        applied: False if the gradient was not finite, in which case every process kept its weights.
    """

    gradient_norm: float
    applied: bool


class Engine:
    """A module under ZeRO, with AdamW and one parameter group per layer group.

    Parameters that no group names take no part: they get no gradient and no optimiser state. Their float32 values are
    kept by rank 0 in `passengers` for the stages to come.

    Args:
        module: float32, the same values on every process, on this process's device. It becomes the engine's: under
            bf16 it is converted in place.
        groups: layer group -> parameter name -> parameter, for every group that is trained.
        settings: see EngineSettings.

    Raises:
        ValueError: if the groups do not fit the module.
        RuntimeError: without a process group, or with a DeepSpeed laid out otherwise than the pinned one.
    """

    def __init__(
        self, module: nn.Module, groups: Mapping[str, Mapping[str, nn.Parameter]], settings: EngineSettings
    ) -> None:
        if not torch.distributed.is_initialized():
            raise RuntimeError("the engine needs a process group: call vdtrain.training.distributed.start first")
        self.module = module
        self.settings = settings
        trained = _checked_names(module, groups)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
        carried = {name: tensor for name, tensor in module.state_dict().items() if name not in trained}
        self.passenger_names = frozenset(carried)
        self.passengers: dict[str, Tensor] = {}
        if distributed.rank() == 0:
            self.passengers = {name: tensor.detach().to("cpu", copy=True) for name, tensor in carried.items()}
        self._scales = {group: float(settings.gradient_scales.get(group, 1.0)) for group in groups}
        self._gradient_hooks = [
            parameter.register_hook(_multiply_by(self._scales[group]))
            for group, parameters in groups.items()
            for parameter in parameters.values()
            if settings.gradient_scale_mode == GRADIENT_MODE
        ]

        layouts = [GroupLayout.of(group, parameters) for group, parameters in groups.items()]
        pieces = [layout.piece(distributed.rank(), distributed.world_size()) for layout in layouts]
        # Taken before DeepSpeed rounds the weights to bf16, of which it makes its float32 copy.
        exact = [cut(groups[layout.group], layout, *piece) for layout, piece in zip(layouts, pieces, strict=True)]
        self._attributes = {name: set(vars(parameter)) for name, parameter in module.named_parameters()}
        device = next(module.parameters()).device
        optimizer = torch.optim.AdamW(
            [{"params": list(parameters.values()), "name": group} for group, parameters in groups.items()],
            lr=0.0,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=device.type == "cuda",
        )
        deepspeed = import_deepspeed(device.type)
        with contextlib.redirect_stdout(io.StringIO()):
            configuration = deepspeed_configuration(settings)
            self._deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=configuration)
        self._optimizer = optimizer
        masters = _masters(self._deepspeed.optimizer)
        self._check_layout(layouts, masters, exact)
        self._partitions = [
            self._partition(layout, start, stop, master)
            for layout, (start, stop), master in zip(layouts, pieces, masters, strict=True)
        ]
        for partition, weights in zip(self._partitions, exact, strict=True):
            partition.master.copy_(weights)
        self._gradients_complete = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the module's weights; DeepSpeed does not convert inputs, so they must come in it."""
        return torch.bfloat16 if self.settings.precision == "bf16" else torch.float32

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        return self._deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's loss, a scalar already divided by the number of micro-batches.

        Every process must run the same flows in the same order. `last` ends the step's accumulation: the gradients are
        averaged over the processes.
        """
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        self._gradients_complete = last

    def step(self, learning_rate: float) -> StepReport:
        """Clip, update the weights, and hand them to every process."""
        if not self._gradients_complete:
            raise RuntimeError("engine.step without engine.backward(loss, last=True) before it")
        self._gradients_complete = False
        by_learning_rate = self.settings.gradient_scale_mode == LEARNING_RATE_MODE
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * (self._scales[group["name"]] if by_learning_rate else 1.0)
        self._deepspeed.step()
        return StepReport(float(self._deepspeed.get_global_grad_norm()), bool(self._deepspeed.was_step_applied()))

    def partitions(self) -> list[Partition]:
        """This process's piece of every layer group, in the order of the groups. Writing to them changes the optimiser;
        call `refresh_weights` afterwards."""
        return self._partitions

    @property
    def optimizer_steps(self) -> int:
        """Updates applied so far, from which AdamW corrects its averages."""
        return int(self._states[0]["step"].item())

    @torch.no_grad()
    def load_partitions(self, read: RowReader, optimizer_steps: int) -> None:
        """Take master weights and optimiser state from `read`, on every process, and refresh the weights."""
        for partition, state in zip(self._partitions, self._states, strict=True):
            for kind, row in partition.rows.items():
                row.copy_(read(partition.layout.group, kind, partition.start, partition.stop))
            state["step"].fill_(optimizer_steps)
        self.refresh_weights()

    @torch.no_grad()
    def load_passengers(self, passengers: Mapping[str, Tensor]) -> None:
        """Set the values of everything that is not trained, on every process."""
        own = self.module.state_dict()
        for name, tensor in passengers.items():
            own[name].copy_(tensor)
        if distributed.rank() == 0:
            self.passengers = dict(passengers)

    def refresh_weights(self) -> None:
        """Bring every process's module up to the master weights; every process must call it."""
        self._deepspeed.optimizer.update_lp_params()

    def close(self) -> None:
        """Release DeepSpeed's hooks, buffers and process groups; the module keeps its last weights."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._deepspeed.destroy()
        # What DeepSpeed leaves behind on the module would keep its engine, and the process groups, alive.
        forward_hooks = (self._deepspeed.module_forward_pre_hook, self._deepspeed.module_forward_post_hook)
        for hook in (*forward_hooks, *self._gradient_hooks):
            hook.remove()
        for name, parameter in self.module.named_parameters():
            for attribute in vars(parameter).keys() - self._attributes[name]:
                delattr(parameter, attribute)
        del self._deepspeed, self._optimizer
        self._partitions = []

    @property
    def _states(self) -> list[dict[str, Tensor]]:
        return [self._optimizer.state[group["params"][0]] for group in self._optimizer.param_groups]

    def _partition(self, layout: GroupLayout, start: int, stop: int, master: Tensor) -> Partition:
        # AdamW would make its state at the first step; a checkpoint needs it before.
        state = self._optimizer.state[master]
        state["step"] = torch.zeros((), device=master.device if master.is_cuda else "cpu")
        for kind in (FIRST_MOMENT, SECOND_MOMENT):
            state[kind] = torch.zeros_like(master, memory_format=torch.preserve_format, requires_grad=False)
        # Without the padding, which is no part of a checkpoint.
        rows = {MASTER: master.detach(), **{kind: state[kind] for kind in (FIRST_MOMENT, SECOND_MOMENT)}}
        return Partition(layout, start, stop, **{kind: row[: stop - start] for kind, row in rows.items()})

    def _check_layout(self, layouts: list[GroupLayout], masters: list[Tensor], exact: list[Tensor]) -> None:
        sizes = [layout.piece_size(distributed.world_size()) for layout in layouts]
        fits = [master.numel() for master in masters] == sizes and all(
            torch.equal(master[: weights.numel()], weights.to(self.compute_dtype).float())
            for master, weights in zip(masters, exact, strict=True)
        )
        if not distributed.all_agree(fits):
            self.close()
            raise RuntimeError(
                "the flat weights of DeepSpeed are not the module's parameters end to end: either the processes "
                f"started from different weights, or this is not the pinned deepspeed=={DEEPSPEED_VERSION}"
            )


def _checked_names(module: nn.Module, groups: Mapping[str, Mapping[str, nn.Parameter]]) -> set[str]:
    """Names of all grouped parameters, after checking them against the module."""
    own = dict(module.named_parameters())
    names: set[str] = set()
    for group, parameters in groups.items():
        if not parameters:
            raise ValueError(f"layer group {group!r} has no parameters")
        for name, parameter in parameters.items():
            if own.get(name) is not parameter or name in names:
                raise ValueError(f"layer group {group!r}: {name!r} is no parameter of the module, or is in two groups")
            if parameter.dtype != torch.float32:
                raise ValueError(f"parameter {name!r} is {parameter.dtype}; the engine starts from float32 weights")
            names.add(name)
    if not names:
        raise ValueError("no layer group is trained; name at least one flow")
    return names


def _multiply_by(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * scale


def _masters(optimizer: Any) -> list[Tensor]:
    for attribute in MASTER_ATTRIBUTES:
        if hasattr(optimizer, attribute) and hasattr(optimizer, "update_lp_params"):
            return list(getattr(optimizer, attribute))
    raise RuntimeError(
        f"DeepSpeed's {type(optimizer).__name__} has none of {MASTER_ATTRIBUTES}; "
        f"install deepspeed=={DEEPSPEED_VERSION}"
    )
