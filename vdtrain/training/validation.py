"""The loss on held-out pairs while a stage trains, by flow and quarter of the timesteps, with fixed noise.

Every pair has one timestep in each quarter. All random numbers of a pair follow from its number alone, so that any
number of processes computes the same losses, and validations of one run differ by its weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vdtrain.config.schema import TrainConfig
from vdtrain.data.loading import fixed_pairs
from vdtrain.diffusion.objective import QUARTERS, Objective, QuarterLosses, StepRandom
from vdtrain.flows import Flow
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.frozen import Encoded, each_tensor
from vdtrain.run import distributed
from vdtrain.seeds import generator_of, seed_of

SEED = "validation"


class PairRandom(StepRandom):
    """The random numbers of pairs by their numbers, whatever batch they are in.

    Args:
        quarter: of the timesteps, from 0.
    """

    def __init__(self, numbers: Sequence[int], quarter: int, device: torch.device) -> None:
        self.numbers, self.quarter, self.device = numbers, quarter, device

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Unit normal noise [b, *shape], the same on every device."""
        rows = [torch.randn(*shape, generator=generator_of(SEED, number, purpose)) for number in self.numbers]
        return torch.stack(rows).to(self.device)

    def integers(self, purpose: str, high: int) -> Tensor:
        """Integers in this quarter of [0, high), [b]."""
        first, last = (self.quarter * high // QUARTERS, (self.quarter + 1) * high // QUARTERS)
        drawn = [first + seed_of(SEED, number, purpose) % (last - first) for number in self.numbers]
        return torch.tensor(drawn, device=self.device)

    def chance(self, purpose: str, probability: float) -> Tensor:
        """Never, [b]: no context is dropped."""
        return torch.zeros(len(self.numbers), dtype=torch.bool, device=self.device)


class PairLosses(QuarterLosses):
    """Takes down the mean squared error of every pair by flow, instead of adding up."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def add(self, flows: Sequence[str], squares: Tensor, timesteps: Tensor) -> None:
        """See `QuarterLosses`."""
        errors = squares.flatten(1).mean(dim=1).view(len(flows), -1).tolist()
        self.found |= dict(zip(flows, errors, strict=True))


class Validation:
    """This process's held-out pairs at one resolution, encoded once.

    Raises:
        ConfigError, ManifestError, StreamError, OSError: they cannot be read.
    """

    def __init__(self, config: TrainConfig, objective: Objective, resolution: int, device: torch.device) -> None:
        rank, world = distributed.rank(), distributed.world_size()
        self.pairs, self.numbers = fixed_pairs(config, resolution, config.validation.pairs, rank, world)
        self.objective, self.device, self.resolution = objective, device, resolution
        size = config.hardware.micro_batch_size[resolution]
        self._batches = [slice(first, first + size) for first in range(0, len(self.numbers), size)]
        self._encoded: list[Encoded] = []

    def encode(self) -> None:
        """Encode the pairs, unless that is done; they stay on the CPU until they are used."""
        for rows in self._batches[len(self._encoded) :]:
            rng = PairRandom(self.numbers[rows], 0, self.device)
            own = self.pairs.cut(rows.start, min(rows.stop, len(self.numbers)))
            samples = {name: each_tensor(lambda one: one.to(self.device), each) for name, each in own.samples.items()}
            encoded = self.objective.encode(samples, self.resolution, rng, rows=own.rows)
            self._encoded.append(encoded.to(torch.device("cpu")))

    def losses(self, diffuser: Diffuser, beat: Callable[[str], None]) -> dict[int, dict[str, list[float]]]:
        """The losses of this process's pairs by number and flow: one for each quarter.

        Args:
            diffuser: with the weights to validate. Its hooks are not called.
        """
        found: dict[int, dict[str, list[float]]] = {number: {} for number in self.numbers}
        for rows, kept in zip(self._batches, self._encoded, strict=True):
            encoded, numbers = kept.to(self.device), self.numbers[rows]
            for quarter in range(QUARTERS):
                beat(f"validating, quarter {quarter + 1} of the timesteps")
                losses = PairLosses()
                self.objective.losses(diffuser.forward, encoded, PairRandom(numbers, quarter, self.device), losses)
                for flow, errors in losses.found.items():
                    having = encoded.pairs_of(Flow.parse(flow))
                    own = numbers if having is None else [numbers[row] for row in having.tolist()]
                    for number, error in zip(own, errors, strict=True):
                        found[number].setdefault(flow, []).append(error)
        return found


def gathered(own: Mapping[int, dict[str, list[float]]]) -> dict[str, Any]:
    """Means over the pairs of all processes that have a flow's modalities, by flow: `loss`, and `quarters`.

    Every process must call it. They are summed exactly, so that the number of processes does not change them.
    """
    everything = {int(number): flows for part in distributed.gather_json(own) for number, flows in part.items()}
    found = {}
    for flow in dict.fromkeys(flow for number in sorted(everything) for flow in everything[number]):
        rows = [everything[number][flow] for number in sorted(everything) if flow in everything[number]]
        quarters = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
        found[flow] = {"loss": math.fsum(quarters) / QUARTERS, "quarters": quarters}
    return found


def figures(losses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The tables of a record: `validation` by flow and weights, `validation_quarters` also by quarter.

    Args:
        losses: by weights ("model" or "ema"), what `gathered` returned.
    """
    means: dict[str, dict[str, float]] = {}
    parts: dict[str, dict[str, dict[str, float]]] = {}
    for weights, flows in losses.items():
        for flow, each in flows.items():
            means.setdefault(flow, {})[weights] = each["loss"]
            quarters = {f"q{number}": loss for number, loss in enumerate(each["quarters"], start=1)}
            parts.setdefault(flow, {})[weights] = quarters
    return {"validation": means, "validation_quarters": parts}
