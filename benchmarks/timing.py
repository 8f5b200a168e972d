"""How long actions take beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds_of(actions: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each action, all of them in turn in every round."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 2):
        for name, action in actions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[2:]) for name, values in taken.items()}
