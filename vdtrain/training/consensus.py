"""What all processes learn of a step together: losses, norm, whether it counted, whether to stop, and that they agree.

One small all-reduce per step carries it, and is read a step later, so that nobody waits for it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vdtrain.training import distributed
from vdtrain.training.distributed import SharedError
from vdtrain.training.engine import StepReport

# Sums of squares of such numbers are exact in float64 for up to 8192 processes.
HASH_BITS = 20


@dataclass(frozen=True)
class StepOutcome:
    """A step as all processes saw it.

    Attributes:
        step: its number.
        losses: mean over the processes of each flow that ran.
        gradient_norm: see StepReport.
        applied: False if the step was left out because a loss or a gradient was not finite.
        stop: whether a process was asked to stop: all do, after the same step.
        replaced: bad samples that others stood in for, over all processes.
    """

    step: int
    losses: dict[str, float]
    gradient_norm: float
    applied: bool
    stop: bool
    replaced: int = 0


class StepConsensus:
    """Sends what this process knows of a step, and gives what all of them know.

    Args:
        flows: names of all flows that a step may run, the same on every process.
        device: where losses and reports are.
    """

    def __init__(self, flows: Sequence[str], device: torch.device) -> None:
        self.flows = list(flows)
        self.device = device
        self._pending: _Pending | None = None

    def submit(
        self, step: int, losses: Mapping[str, Tensor], report: StepReport, signal_number: int, replaced: int = 0
    ) -> None:
        """Send this process's losses, by flow in the order that they ran, the number of the signal it received, and how
        many bad samples were replaced in its batch.

        Every process must call it in every step, and collect what it submitted before.
        """
        ran = list(losses)
        number = fingerprint(step, ran)
        count = len(self.flows)
        # Filled in one by one: a tensor made of Python numbers on a GPU would wait for it.
        vector = torch.zeros(count + 6, dtype=torch.float64, device=self.device)
        for position, name in enumerate(self.flows):
            if name in losses:
                vector[position] = losses[name].detach()
        vector[count], vector[count + 1] = report.gradient_norm, report.applied
        for position, value in enumerate((signal_number, replaced, number, number * number), start=count + 2):
            vector[position].fill_(value)
        work = dist.all_reduce(vector, async_op=True) if distributed.world_size() > 1 else None
        if self.device.type == "cuda":
            if work is not None:
                work.wait()  # The stream does, not this process.
            vector = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True).copy_(vector, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending = _Pending(step, ran, vector, arrived.synchronize)
        else:
            self._pending = _Pending(step, ran, vector, None if work is None else work.wait)

    def collect(self) -> StepOutcome | None:
        """The submitted step; None if nothing was submitted since.

        Raises:
            SharedError: on every process, if they are not at the same step or did not run the same flows in it.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        if pending.wait is not None:
            pending.wait()
        *losses, norm, applied, signals, replaced, number, squares = pending.vector.tolist()
        processes = distributed.world_size()
        # Equality holds for equal numbers only (Cauchy and Schwarz).
        if processes * int(squares) != int(number) ** 2:
            raise SharedError(
                f"step {pending.step}: the processes are not at the same step with the same flows (process "
                f"{distributed.rank()} ran {', '.join(pending.ran)}), so that their weights are of no use; give all of "
                "them the same configuration and seed, and run the same command again"
            )
        means = {name: loss / processes for name, loss in zip(self.flows, losses, strict=True) if name in pending.ran}
        return StepOutcome(pending.step, means, norm / processes, applied == processes, signals > 0, int(replaced))


class BadSteps:
    """Counts steps that were left out, and ends a run that no longer gets anywhere.

    Args:
        limit: as many of them in a row are an error (optimizer.max_bad_steps).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._in_a_row = 0

    def add(self, outcome: StepOutcome) -> None:
        """Take note of a step.

        Raises:
            SharedError: on every process, if it is one too many.
        """
        if outcome.applied:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._in_a_row < self.limit:
            return
        bad = [name for name, loss in outcome.losses.items() if not math.isfinite(loss)]
        raise SharedError(
            f"step {outcome.step}: the last {self._in_a_row} steps were left out for a loss or a gradient that was not "
            f"finite (losses not finite: {', '.join(bad) or 'none'}; optimizer.max_bad_steps={self.limit}); the "
            "weights are those of before: continue from the last checkpoint with a lower stage.learning_rate, or look "
            "for the cause in the data"
        )


@dataclass(frozen=True)
class _Pending:
    step: int
    ran: list[str]
    vector: Tensor
    wait: Callable[[], object] | None


def fingerprint(step: int, flows: Sequence[str]) -> int:
    """A number below 2^20 of a step and its flows in their order; a million to one, others have another."""
    digest = hashlib.sha256(f"{step} {' '.join(flows)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> (32 - HASH_BITS)
