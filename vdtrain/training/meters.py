"""What a run reports of itself: losses over all ranks, speed, waiting, memory; one line per interval."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vdtrain.training.consensus import StepOutcome


@dataclass
class Interval:
    """Sums since the last log line."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    gradient_norms: list[float] = field(default_factory=list)
    waited: float = 0.0
    pairs: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, outcome: StepOutcome) -> None:
        """Take in a step, unless it was left out: its figures are no numbers, and would hide those of the others."""
        if not outcome.applied:
            return
        self.gradient_norms.append(outcome.gradient_norm)
        for name, loss in outcome.losses.items():
            self.losses.setdefault(name, []).append(loss)

    def summary(self, device: torch.device) -> dict[str, Any]:
        """Means and rates of the interval, ready for JSON and for the tracker."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        return {
            "loss": {name: sum(values) / len(values) for name, values in self.losses.items()},
            # None where all steps of the interval were left out.
            "gradient_norm": sum(self.gradient_norms) / len(self.gradient_norms) if self.gradient_norms else None,
            "pairs_per_second": self.pairs / seconds,
            "data_wait": self.waited / seconds,
            "memory_gb": memory_gb(device),
        }


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB (1e9 bytes): on the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def log_line(record: Mapping[str, Any]) -> str:
    """One record as the line that a person reads."""
    losses = " | ".join(f"{name} {loss:.4f}" for name, loss in record["loss"].items()) or "no step counted"
    norm = "-" if record["gradient_norm"] is None else f"{record['gradient_norm']:.3f}"
    return (
        f"step {record['step']} | {record['resolution']} px | "
        f"samples {record['samples']:,}/{record['total_samples']:,} | "
        f"{losses} | grad {norm} | lr {record['learning_rate']:.2e} | "
        f"{record['pairs_per_second']:.1f} pairs/s | data wait {record['data_wait']:.0%} | {record['memory_gb']:.2f} GB"
        + (f" | skipped {record['skipped']}" if record["skipped"] else "")
        + (f" | bad samples {record['replaced']}" if record["replaced"] else "")
    )
