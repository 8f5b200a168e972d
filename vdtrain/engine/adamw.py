"""AdamW on flat buffers: in separate passes, or in one compiled pass that also moves the EMA and casts the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vdtrain.engine.deepspeed import EngineSettings

# Elements whose squares are summed in float32.
PIECE = 256
# Elements whose update is computed together when it is measured: 16 MB each for a few temporary tensors on a CPU, and
# 128 MB on a GPU, where the launches of many small pieces took 190 ms of a step (benchmarks/results/gpu.json).
MEASURED_PIECE, MEASURED_PIECE_GPU = 1 << 22, 1 << 25
# The compiled pass takes whole multiples of so many elements together, and the rest of a buffer by itself.
WHOLE = 1024
# Compiled forms of the pass: two for each size of a layer group. Beyond PyTorch's default of 8, others run eagerly.
FORMS = 64


@dataclass(frozen=True)
class FusedTargets:
    """What else one pass over the buffers updates.

    Attributes:
        weights: of each buffer, in the compute dtype.
        averages: of each buffer, its EMA; None if there is none. It may lack the buffer's padding.
        share: float32 scalar, by which the EMA moves towards the new weights.
        clear: whether the gradients become 0.
    """

    weights: Sequence[Tensor]
    averages: Sequence[Tensor | None]
    share: Tensor
    clear: bool


class FlatAdamW:
    """AdamW (arXiv 1711.05101) on flat float32 buffers, one per layer group, each with its own learning rate.

    Args:
        masters: the trained buffers; updated in place.
        settings: betas, epsilon and weight decay.
    """

    def __init__(self, masters: Sequence[Tensor], settings: EngineSettings) -> None:
        self.masters = list(masters)
        self.first_moments = [torch.zeros_like(master) for master in self.masters]
        self.second_moments = [torch.zeros_like(master) for master in self.masters]
        # On the device, which decides whether a step counts.
        self._steps = [torch.zeros((), device=master.device) for master in self.masters]
        self._settings = settings

    @property
    def counts(self) -> list[int]:
        """Updates applied so far to each buffer, for the bias correction. Reading them waits for the device."""
        return [int(count) for count in torch.stack(self._steps).tolist()]

    @counts.setter
    def counts(self, counts: Sequence[int]) -> None:
        for step, count in zip(self._steps, counts, strict=True):
            step.fill_(count)

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], rates: Sequence[float], divisor: Tensor, finite: Tensor) -> None:
        """Update every buffer without waiting for the device.

        Args:
            gradients: one per buffer; their contents are undefined afterwards.
            rates: learning rate of each buffer.
            divisor: scalar; the gradients are divided by it first.
            finite: boolean scalar; if false, buffers, moments and the count of updates keep every bit.
        """
        skipped = (~finite).float()
        buffers = zip(self.masters, gradients, self.first_moments, self.second_moments, self._steps, rates, strict=True)
        for master, gradient, first_moment, second_moment, step, rate in buffers:
            adamw(
                [master],
                [gradient],
                [first_moment],
                [second_moment],
                [],
                [step],
                fused=True,
                grad_scale=divisor.float(),
                found_inf=skipped,
                amsgrad=False,
                beta1=self._settings.betas[0],
                beta2=self._settings.betas[1],
                lr=rate,
                weight_decay=self._settings.weight_decay,
                eps=self._settings.epsilon,
                maximize=False,
            )

    @torch.no_grad()
    def update_fused(
        self,
        gradients: Sequence[Tensor],
        rates: Sequence[float],
        divisor: Tensor,
        finite: Tensor,
        targets: FusedTargets,
    ) -> None:
        """`update`, in one compiled pass over each buffer that also writes the targets.

        The separate passes read and write 50 bytes an element, this one 42.
        """
        numbers = self._numbers(rates, divisor, finite, targets.share)
        each = zip(gradients, targets.weights, targets.averages, strict=True)
        for index, (gradient, weights, average) in enumerate(each):
            # The padding is 0 and stays 0.
            length = self.masters[index].numel() if average is None else average.numel()
            buffers = (self.masters[index], gradient, self.first_moments[index], self.second_moments[index], weights)
            # A GPU loads several elements at once only where their number is known to divide.
            body = length - length % WHOLE
            for part in (slice(0, body), slice(body, length)):
                own = [buffer[part] for buffer in buffers]
                if len(own[0]):
                    averaged = None if average is None else average[part]
                    _compiled_pass()(*own, averaged, numbers[index], *self._constants, targets.clear)
        for step in self._steps:
            step += finite

    @property
    def _constants(self) -> tuple[float, float, float]:
        return (*self._settings.betas, self._settings.epsilon)

    def _numbers(self, rates: Sequence[float], divisor: Tensor, finite: Tensor, share: Tensor) -> Tensor:
        """What the pass needs to know of each buffer, float32 [buffers, 6]; see `_pass`."""
        first, second = self._settings.betas
        # The numbers are filled in on the device: a copy from the host would wait for it.
        rate = torch.stack([torch.full((), rate, dtype=torch.float64, device=divisor.device) for rate in rates])
        count = torch.stack(self._steps).double() + 1
        columns = [
            rate * self._settings.weight_decay,
            rate / (1 - first**count),
            (1 - second**count).sqrt(),
            *(value.double().expand_as(rate) for value in (divisor, share, finite)),
        ]
        return torch.stack(columns, dim=1).float()

    @torch.no_grad()
    def measure(self, index: int, part: slice, rate: float) -> Tensor:
        """Sums of squares of part of a buffer and of its last applied update: float64 [2], on the device.

        The update follows from the moments, so that no copy of the weights from before it is needed.
        """
        first, second = self._settings.betas
        decay, count = self._settings.weight_decay, self._steps[index].double()
        first_bias, second_bias = (1 - first**count).float(), (1 - second**count).float()
        squares = torch.zeros(2, dtype=torch.float64, device=count.device)
        buffers = (self.masters[index], self.first_moments[index], self.second_moments[index])
        size = MEASURED_PIECE_GPU if count.is_cuda else MEASURED_PIECE
        pieces = zip(*(buffer[part].split(size) for buffer in buffers), strict=True)
        for weights, first_moment, second_moment in pieces:
            direction = (second_moment / second_bias).sqrt_().add_(self._settings.epsilon)
            direction = (first_moment / first_bias).div_(direction).add_(weights, alpha=decay)
            squares += torch.stack([sum_of_squares(weights), sum_of_squares(direction)])
        # From the weights after the update: w' = (1 - rate decay) w - rate u.
        squares[1] *= (rate / (1 - rate * decay)) ** 2
        return squares


def _pass(
    master: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    weights: Tensor,
    average: Tensor | None,
    numbers: Tensor,
    first: float,
    second: float,
    epsilon: float,
    clear: bool,
) -> None:
    """One update of part of a buffer, in place; the compiler makes one loop of it, and one that clears gradients.

    Args:
        numbers: weight decay and step size, both times the learning rate; the root of the second moment's bias; the
            gradient's divisor; the share of the EMA; whether the update counts.
    """
    decay, size, root, divisor, share, counts = numbers.unbind()
    applied = counts > 0
    scaled = gradient / divisor
    moment = torch.lerp(first_moment, scaled, 1 - first)
    square = second * second_moment + (1 - second) * scaled * scaled
    moved = master - decay * master - size * moment / (square.sqrt() / root + epsilon)
    updated = torch.where(applied, moved, master)
    first_moment.copy_(torch.where(applied, moment, first_moment))
    second_moment.copy_(torch.where(applied, square, second_moment))
    if average is not None:
        average.copy_(torch.where(applied, torch.lerp(average, updated, share), average))
    master.copy_(updated)
    weights.copy_(updated)
    if clear:
        gradient.zero_()


@cache
def _compiled_pass() -> Callable[..., None]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)
    return torch.compile(_pass, dynamic=False)


def sum_of_squares(values: Tensor) -> Tensor:
    """Sum of the squares of a flat float32 tensor: a float64 scalar on its device.

    Short pieces are summed in float32 and joined in float64. The relative error is below 2e-6, without a float64 copy
    of the tensor. Squares below 1e-38 may count as 0; a piece whose sum overflows float32 is infinite.
    """
    pieces = values.numel() // PIECE
    body, rest = values.split([pieces * PIECE, values.numel() - pieces * PIECE])
    norms = [torch.linalg.vector_norm(body.view(pieces, PIECE), dim=1), torch.linalg.vector_norm(rest).view(1)]
    return torch.cat(norms).double().square().sum()
