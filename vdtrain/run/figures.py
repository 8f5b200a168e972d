"""The lines of metrics.jsonl under the names that trackers show (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Line = Mapping[str, Any]


def flat(line: Line) -> dict[str, float]:
    """The numbers of a line: {"learning_rates": {"global": 1e-4}} is {"learning_rate/global": 1e-4}.

    A table loses the s at its end, so that its parts stand below the figure that they are parts of.
    """
    found: dict[str, float] = {}
    for key, value in line.items():
        if key != "time":
            table = isinstance(value, Mapping) and key != "loss"
            found |= _named(key.removesuffix("s") if table else key, value)
    return found


def _named(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        parts = (_named(f"{name}/{key}", each) for key, each in value.items())
        return {key: each for part in parts for key, each in part.items()}
    return {name: value} if isinstance(value, int | float) else {}
