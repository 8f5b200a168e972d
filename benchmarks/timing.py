"""How long actions take beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Action = Callable[[], object]
WARM_UP = 2


def interleaved(
    actions: Mapping[str, Action],
    device: torch.device,
    rounds: int,
    after: Mapping[str, Action] | None = None,
    warm_up: int = WARM_UP,
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds of all threads) of each action in each round.

    All actions run in turn in every round, and every round begins with the next one.

    Args:
        after: by action, what is done after it and takes no part in its time.
        warm_up: rounds before the first that counts.
    """
    names, after = list(actions), after or {}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            _wait(device)
            began = time.perf_counter(), time.process_time()
            actions[name]()
            _wait(device)
            if number >= warm_up:
                taken[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
            if name in after:
                after[name]()
    return taken


def seconds_of(actions: Mapping[str, Action], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each action, all of them in turn in every round."""
    taken = interleaved(actions, device, rounds)
    return {name: statistics.median(wall for wall, _ in each) for name, each in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
