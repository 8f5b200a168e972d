"""AdamW over flat rows, which the device itself keeps from applying a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vdtrain.training.engine_settings import EngineSettings


class GuardedAdamW:
    """AdamW (arXiv 1711.05101), one flat float32 row per layer group, each with a learning rate of its own.

    Args:
        masters: the rows that are trained; updated in place.
        settings: betas, epsilon and weight decay.
    """

    def __init__(self, masters: Sequence[Tensor], settings: EngineSettings) -> None:
        self.masters = list(masters)
        self.first_moments = [torch.zeros_like(master) for master in self.masters]
        self.second_moments = [torch.zeros_like(master) for master in self.masters]
        # On the device, for there it is decided whether a step counts.
        self._steps = [torch.zeros((), device=master.device) for master in self.masters]
        self._settings = settings

    @property
    def steps(self) -> int:
        """Updates applied so far, from which the averages are corrected. Reading it waits for the device."""
        return int(self._steps[0].item())

    @steps.setter
    def steps(self, count: int) -> None:
        for step in self._steps:
            step.fill_(count)

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], rates: Sequence[float], divisor: Tensor, finite: Tensor) -> None:
        """Update every row, without waiting for the device.

        Args:
            gradients: one to a row; what they hold afterwards is undefined.
            rates: learning rate of each row.
            divisor: by which the gradients are divided first; a scalar.
            finite: a boolean scalar; where it is false, rows, averages and the count of updates keep every bit.
        """
        left_out = (~finite).float()
        rows = zip(self.masters, gradients, self.first_moments, self.second_moments, self._steps, rates, strict=True)
        for master, gradient, first_moment, second_moment, step, rate in rows:
            adamw(
                [master],
                [gradient],
                [first_moment],
                [second_moment],
                [],
                [step],
                fused=True,
                grad_scale=divisor.float(),
                found_inf=left_out,
                amsgrad=False,
                beta1=self._settings.betas[0],
                beta2=self._settings.betas[1],
                lr=rate,
                weight_decay=self._settings.weight_decay,
                eps=self._settings.epsilon,
                maximize=False,
            )
