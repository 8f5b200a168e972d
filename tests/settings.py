"""Settings that small runs of the tests have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

TINY = ("model=tiny", "data=shapes", "hardware=cpu", "tracking=none")


def phases(batch: int, *each: tuple[int, int]) -> str:
    """The setting of a stage's phases, each of (resolution, steps); a phase without steps is left out."""
    kept = [f"{{resolution:{side},samples:{steps * batch}}}" for side, steps in each if steps]
    return f"stage.phases=[{','.join(kept)}]"


def own_time(**changes: Callable[..., Any]) -> SimpleNamespace:
    """Python's `time` with changes, to put into one module: threads of others keep theirs."""
    return SimpleNamespace(**(vars(time) | changes))
