"""Everything about a run's progress that must survive a restart, beside the weights and the optimiser."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Position in a stage. Data order, noise and learning rate are all functions of it and of the configuration.

    Attributes:
        step: optimiser steps since the stage began.
        phase: index of the phase that the next step belongs to.
        phase_step: optimiser steps of that phase already done.
        skipped: steps that were left out because a gradient was not finite.
        replaced: bad samples that others stood in for.
        data: identity of the files that the phase's stream reads, "" where it has none.
    """

    step: int = 0
    phase: int = 0
    phase_step: int = 0
    skipped: int = 0
    replaced: int = 0
    data: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        return cls(**values)
