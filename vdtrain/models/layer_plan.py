"""The order of data layers, context layers and skips; it is the same for every modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from vdtrain.config.schema import DiffuserConfig

NORM_EPSILON = 1e-5


class Role(Enum):
    """The role of a data layer; each modality has its own module for each role."""

    INPUT = "input"
    BLOCK = "block"
    DOWN = "down"
    UP = "up"
    OUTPUT = "output"


@dataclass(frozen=True)
class DataStep:
    """One data layer, from `width_in` (with the skip) to `width_out` channels."""

    role: Role
    width_in: int
    width_out: int


@dataclass(frozen=True)
class ContextStep:
    """One context layer at a width of `width` channels."""

    width: int


Step = DataStep | ContextStep | Literal["save", "load"]


@dataclass(frozen=True)
class LayerPlan:
    """The steps of one pass through the diffuser, and the sizes that all modalities share."""

    steps: tuple[Step, ...]
    heads: int
    norm_groups: int
    time_width: int
    embedding_width: int

    @property
    def data_steps(self) -> list[DataStep]:
        return [step for step in self.steps if isinstance(step, DataStep)]

    @property
    def context_steps(self) -> list[ContextStep]:
        return [step for step in self.steps if isinstance(step, ContextStep)]


def make_plan(config: DiffuserConfig) -> LayerPlan:
    """Plan the U-Net: levels down, a middle with attention, levels up, and a skip from every layer on the way down.

    The full size has 30 data layers and 16 context layers, in the order of the released weights.
    """
    channels: Sequence[int] = config.channels
    attention = set(config.attention_levels)
    steps: list[Step] = [DataStep(Role.INPUT, 0, channels[0]), "save"]
    skips = [channels[0]]
    width = channels[0]
    last = len(channels) - 1
    for level, level_width in enumerate(channels):
        for _ in range(config.blocks_per_level):
            steps.append(DataStep(Role.BLOCK, width, level_width))
            width = level_width
            if level in attention:
                steps.append(ContextStep(width))
            steps.append("save")
            skips.append(width)
        if level < last:
            steps += [DataStep(Role.DOWN, width, width), "save"]
            skips.append(width)
    steps += [DataStep(Role.BLOCK, width, width), ContextStep(width), DataStep(Role.BLOCK, width, width)]
    for level in range(last, -1, -1):
        for _ in range(config.blocks_per_level + 1):
            steps += ["load", DataStep(Role.BLOCK, width + skips.pop(), channels[level])]
            width = channels[level]
            if level in attention:
                steps.append(ContextStep(width))
        if level > 0:
            steps.append(DataStep(Role.UP, width, width))
    steps.append(DataStep(Role.OUTPUT, width, 0))
    return LayerPlan(tuple(steps), config.heads, config.norm_groups, channels[0], 4 * channels[0])
