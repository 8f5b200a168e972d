"""What goes wrong with the data of one process, and what all processes do about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vdtrain.config.schema import TrainConfig
from vdtrain.data.loading import data_problem
from vdtrain.data.manifest import ManifestError
from vdtrain.data.stream import StreamError
from vdtrain.errors import ConfigError, one_line, passes
from vdtrain.run import distributed
from vdtrain.run.distributed import SharedError
from vdtrain.run.watchdog import Watchdog

# Characters of the line on a skipped step that name samples.
NAMED_CHARACTERS = 2000
# Errors that say themselves what is wrong and what to do.
KNOWN = (ConfigError, ManifestError, StreamError, OSError)


class DataError(SharedError):
    """The data of a process cannot be read, so all stop after the same step.

    Attributes:
        passes: whether a later start may do better.
        stuck: whether a thread of this process still waits for a read.
    """

    def __init__(self, message: str, passes: bool, stuck: bool = False) -> None:
        super().__init__(message)
        self.passes, self.stuck = passes, stuck


@dataclass(frozen=True)
class Tried:
    """A step of this process that is not known to be applied.

    Attributes:
        names: of the samples; see `Batch`.
        positions: int64 [b].
        losses: of each micro-batch, by flow.
    """

    names: Sequence[str]
    positions: Tensor
    losses: list[dict[str, Tensor]]

    def poisoned(self) -> str:
        """Which flows' losses are not finite, and the samples of those micro-batches; empty if all are."""
        bad = [{name for name, loss in each.items() if not math.isfinite(loss)} for each in self.losses]
        flows = sorted(set().union(*bad))
        if not flows:
            return ""
        names = self.names or [f"position {position}" for position in self.positions.tolist()]
        micro = len(names) // len(self.losses)
        samples = [name for number, name in enumerate(names) if bad[number // micro]]
        listed = ", ".join(samples)
        if len(listed) > NAMED_CHARACTERS:
            listed = f"{listed[:NAMED_CHARACTERS]}..."
        whose = "the sample" if len(samples) == 1 else f"a micro-batch, of these {len(samples)} samples"
        return f"the loss of {', '.join(flows)} is not finite on process {distributed.rank()}, for {whose}: {listed}"


def agreed(error: Exception | None, config: TrainConfig, watchdog: Watchdog) -> DataError | None:
    """What ends the run if the data of a process failed. Every process calls it, with its own error or None."""
    failure = None
    if error is not None:
        watchdog.record(f"process {distributed.rank()} could not go on with its data", error)
        line = f"{type(error).__name__}: {one_line(error)}; see {watchdog.folder}"
        failure = [data_problem(error, config.data.manifest) if isinstance(error, KNOWN) else line, passes(error)]
    failures = [(rank, *each) for rank, each in enumerate(distributed.gather_json(failure)) if each]
    if not failures:
        return None
    rank, line, _ = failures[0]
    others = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
    if len({each[1] for each in failures}) > 1 or len(failures) < distributed.world_size():
        line = f"process {rank}{others}: {line}"
    return DataError(line, passes=all(each[2] for each in failures))
