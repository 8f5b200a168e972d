"""Everything about a run's progress that must survive a restart, beside the weights and the optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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

    def done(self, steps: Sequence[int]) -> list[int]:
        """Steps done of every phase that has begun, first phase first.

        Args:
            steps: of the phases of the configuration that the position belongs to.

        Raises:
            ValueError: no run with these phases comes to this position.
        """
        done = [*steps[: self.phase], self.phase_step]
        while len(done) > 1 and done[-1] == 0:
            done.pop()
        if self.phase > len(steps) or sum(done) != self.step or len(done) > len(steps):
            raise ValueError(f"step {self.step} is not step {self.phase_step} of phase {self.phase}, of {list(steps)}")
        return done

    def settled(self, steps: Sequence[int]) -> TrainState:
        """The same position, at the end of a phase rather than before the next one, which may come to be another."""
        done = self.done(steps)
        return replace(self, phase=len(done) - 1, phase_step=done[-1])

    def completes(self, steps: Sequence[int]) -> bool:
        """Whether nothing is left to train of phases of so many steps."""
        return self.phase >= len(steps) or (self.phase == len(steps) - 1 and self.phase_step >= steps[-1])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        return cls(**values)
