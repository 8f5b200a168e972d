"""DeepSpeed's ZeRO 1 and 2: it partitions the optimiser's buffers, reduces gradients and gathers the weights.

DeepSpeed's own step (norm, clipping, skipping, AdamW) waits for the device several times, so the engine does that work.
Only this file reads DeepSpeed's private attributes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdtrain.engine.deepspeed import DEEPSPEED_VERSION, EngineSettings, deepspeed_configuration, import_deepspeed
from vdtrain.engine.flat import GroupLayout, cut
from vdtrain.run import distributed

# Where DeepSpeed keeps this process's flat float32 weights: ZeRO 1 and 2 under the first name; its bf16 optimiser
# (ZeRO 1 with float32 accumulation) under the second.
MASTER_ATTRIBUTES = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")


class ZeroStrategy:
    """This process's partitions of weights and gradients, under DeepSpeed. See engine.Strategy.

    Raises:
        RuntimeError: on every process, if their weights differ, or if DeepSpeed's memory layout is not that of the
            pinned version.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Mapping[str, Mapping[str, nn.Parameter]],
        layouts: Sequence[GroupLayout],
        settings: EngineSettings,
    ) -> None:
        self._module = module
        partitions = [layout.partition(distributed.rank(), distributed.world_size()) for layout in layouts]
        # DeepSpeed broadcasts and joins weights in the order of their shape alone.
        module.to(memory_format=torch.contiguous_format)
        # Taken before DeepSpeed rounds the weights to bf16, of which it makes its float32 copy.
        exact = [
            cut(groups[layout.group], layout, *partition) for layout, partition in zip(layouts, partitions, strict=True)
        ]
        # Before DeepSpeed, which adds up what they return.
        self._hooks = [
            parameter.register_hook(_multiply_by(settings.gradient_scale(group)))
            for group, parameters in groups.items()
            for parameter in parameters.values()
            if settings.gradient_scale(group) != 1.0
        ]
        self._attributes = {name: set(vars(parameter)) for name, parameter in module.named_parameters()}
        # DeepSpeed reads the groups from it; it never steps.
        grouping = torch.optim.AdamW([{"params": list(parameters.values())} for parameters in groups.values()], lr=0.0)
        deepspeed = import_deepspeed(next(module.parameters()).device.type)
        groups_of_processes: Any = importlib.import_module("deepspeed.utils.groups")
        if groups_of_processes._WORLD_GROUP is None:
            # DeepSpeed would make this group with PyTorch's time-out.
            groups_of_processes._WORLD_GROUP = distributed.new_group()
        with contextlib.redirect_stdout(io.StringIO()):
            configuration = deepspeed_configuration(settings)
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=grouping, config=configuration)
        self._optimizer = self._engine.optimizer
        self.masters = [master.detach() for master in _masters(self._optimizer)]
        sizes = [layout.partition_size(distributed.world_size()) for layout in layouts]
        fits = [master.numel() for master in self.masters] == sizes and all(
            torch.equal(master[: weights.numel()], weights.to(settings.compute_dtype).float())
            for master, weights in zip(self.masters, exact, strict=True)
        )
        if not distributed.all_agree(fits):
            self.close()
            raise RuntimeError(
                "the flat weights of DeepSpeed are not the module's parameters end to end: either the processes "
                f"started from different weights, or this is not the pinned deepspeed=={DEEPSPEED_VERSION}"
            )
        for master, weights in zip(self.masters, exact, strict=True):
            master[: weights.numel()] = weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradients(self) -> list[Tensor]:
        if hasattr(self._optimizer, MASTER_ATTRIBUTES[1]):
            return list(self._optimizer.fp32_groups_gradient_flat_partition)
        return [_flat(self._optimizer.averaged_gradients[index]) for index in range(len(self.masters))]

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()
        # DeepSpeed would take leftovers for the next step's gradients.
        for gradients in ("averaged_gradients", "all_grad_tensors"):
            getattr(self._optimizer, gradients, {}).clear()

    def local_slice(self, start: int, stop: int) -> slice:
        return slice(0, stop - start)

    def all_gather(self, buffers: Sequence[Tensor]) -> None:
        """Do nothing: a process needs only its own partitions."""

    def lowered(self) -> None:
        """None: DeepSpeed copies the weights itself."""

    def broadcast(self, written: bool = False) -> None:
        self._optimizer.update_lp_params()

    def settle(self) -> None:
        """Do nothing: DeepSpeed's gather has ended when `broadcast` returns."""

    def close(self) -> None:
        for scaling in self._hooks:
            scaling.remove()
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine.destroy()
        # DeepSpeed's leftovers on the module would keep its engine and the process groups alive.
        for hook in (self._engine.module_forward_pre_hook, self._engine.module_forward_post_hook):
            hook.remove()
        for name, parameter in self._module.named_parameters():
            for attribute in vars(parameter).keys() - self._attributes[name]:
                delattr(parameter, attribute)
        del self._engine, self._optimizer


def _multiply_by(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * scale


def _flat(gradients: Any) -> Tensor:
    """A group's gradients as one flat buffer; DeepSpeed keeps a list of parts."""
    buffer = getattr(gradients, "flat_partition", None)
    return buffer if isinstance(buffer, Tensor) else torch.cat([part.reshape(-1) for part in gradients])


def _masters(optimizer: Any) -> list[Tensor]:
    for attribute in MASTER_ATTRIBUTES:
        if hasattr(optimizer, attribute) and hasattr(optimizer, "update_lp_params"):
            return list(getattr(optimizer, attribute))
    raise RuntimeError(
        f"DeepSpeed's {type(optimizer).__name__} has none of {MASTER_ATTRIBUTES}; "
        f"install deepspeed=={DEEPSPEED_VERSION}"
    )
