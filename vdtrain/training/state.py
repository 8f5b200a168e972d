"""The progress of a run that a restart needs, beside weights and optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass
class TrainState:
    """Position in a stage. Data order, noise and learning rate are functions of it and the configuration.

    Attributes:
        step: optimiser steps since the start of the stage.
        phase: index of the next step's phase.
        phase_step: finished optimiser steps of that phase.
        skipped: steps skipped because a loss or a gradient was not finite.
        replaced: bad samples replaced by others.
        data: identity of the stream's files; "" if it has none.
    """

    step: int = 0
    phase: int = 0
    phase_step: int = 0
    skipped: int = 0
    replaced: int = 0
    data: str = ""

    def done(self, steps: Sequence[int]) -> list[int]:
        """Finished steps of every started phase, in order.

        Args:
            steps: of each phase, in the configuration that the position belongs to.

        Raises:
            ValueError: a run with these phases cannot reach this position.
        """
        done = [*steps[: self.phase], self.phase_step]
        while len(done) > 1 and done[-1] == 0:
            done.pop()
        if self.phase > len(steps) or sum(done) != self.step or len(done) > len(steps):
            raise ValueError(f"step {self.step} is not step {self.phase_step} of phase {self.phase}, of {list(steps)}")
        return done

    def settled(self, steps: Sequence[int]) -> TrainState:
        """The same position, expressed as the end of a phase: the next phase may change."""
        done = self.done(steps)
        return replace(self, phase=len(done) - 1, phase_step=done[-1])

    def completes(self, steps: Sequence[int]) -> bool:
        """Whether phases with these numbers of steps are complete."""
        return self.phase >= len(steps) or (self.phase == len(steps) - 1 and self.phase_step >= steps[-1])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of `to_dict`.

        Raises:
            TypeError, ValueError: the values are not those of a position.
        """
        found = cls(**values)
        numbers = (found.step, found.phase, found.phase_step, found.skipped, found.replaced)
        if any(type(each) is not int or each < 0 for each in numbers):
            raise ValueError(f"no position: {values}")
        return found
