"""ZeRO 0: every process holds everything whole, and one all-reduce per step joins the gradients.

DeepSpeed has no stage 0 for bf16 with float32 accumulation, and this needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vdtrain.training import distributed
from vdtrain.training.engine_settings import EngineSettings
from vdtrain.training.partitions import GroupLayout, cut


class Replicas:
    """Whole rows of weights and gradients on every process. See engine.Exchange.

    Raises:
        RuntimeError: on every process, if they started from different weights.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Mapping[str, Mapping[str, nn.Parameter]],
        layouts: Sequence[GroupLayout],
        settings: EngineSettings,
    ) -> None:
        self._module = module
        self._hooks: list[Any] = []
        _check_same_start(module)
        world_size = distributed.world_size()
        sizes = [layout.piece_size(world_size) * world_size for layout in layouts]
        device = next(module.parameters()).device
        self._master = torch.zeros(sum(sizes), device=device)
        self._gradient = torch.zeros_like(self._master)
        self.masters = list(self._master.split(sizes))
        for layout, master in zip(layouts, self.masters, strict=True):
            master[: layout.numel] = cut(groups[layout.group], layout, 0, layout.numel)
        module.to(settings.compute_dtype)
        # In float32 the masters are the module's weights.
        self._weights = self._master.to(settings.compute_dtype)
        rows = zip(layouts, self._weights.split(sizes), self._gradient.split(sizes), strict=True)
        for layout, weights, gradients in rows:
            for slot in layout.slots:
                part = slice(slot.offset, slot.offset + slot.numel)
                parameter = groups[layout.group][slot.name]
                parameter.data = weights[part].view(slot.shape)
                add = _add_mean_to(gradients[part].view(slot.shape), 1.0 / world_size)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(add))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        if last and distributed.world_size() > 1:
            dist.all_reduce(self._gradient)

    def gradients(self) -> list[Tensor]:
        return list(self._gradient.split([master.numel() for master in self.masters]))

    def forget_gradients(self) -> None:
        self._gradient.zero_()

    def own_part(self, start: int, stop: int) -> slice:
        return slice(start, stop)

    def share(self, rows: Sequence[Tensor]) -> None:
        world_size = distributed.world_size()
        for row in rows:
            own = row.view(world_size, -1)[distributed.rank()].clone()
            dist.all_gather(list(row.view(world_size, -1).unbind()), own)

    def spread(self) -> None:
        if self._weights is not self._master:
            self._weights.copy_(self._master)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _add_mean_to(total: Tensor, share: float) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        # Each backward's gradient goes into the float32 sum as it comes, and its own memory is free at once.
        total.add_(parameter.grad, alpha=share)
        parameter.grad = None

    return add


def _check_same_start(module: nn.Module) -> None:
    same = True
    for tensor in module.state_dict().values():
        first = tensor.detach().clone()
        dist.broadcast(first, src=0)
        same = same and torch.equal(first, tensor)
    if not distributed.all_agree(same):
        raise RuntimeError("the processes started from different weights; build the module from the same seed and file")
