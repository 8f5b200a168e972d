"""Modalities, flows and the layer groups that a flow trains.

A *flow* goes from a context modality to an output modality: text-to-image generates an image from a caption,
image-to-image is image variation. One flow uses three groups of layers (Versatile Diffusion, section 3.2):
the global layers, the data layers of its output modality and the context layers of its context modality.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from vdtrain.config.suggestions import meant
from vdtrain.errors import ConfigError

SEPARATOR = "-to-"
GLOBAL_GROUP = "global"


@dataclass(frozen=True, order=True)
class Flow:
    """One way through the network: generate `output` from `context`."""

    output: str
    context: str

    @classmethod
    def parse(cls, name: str) -> Flow:
        """Read "CONTEXT-to-OUTPUT", e.g. "text-to-image".

        Raises:
            ValueError: if the name is not two modalities joined by "-to-".
        """
        parts = name.split(SEPARATOR)
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"flow {name!r} is not CONTEXT{SEPARATOR}OUTPUT, e.g. text{SEPARATOR}image")
        return cls(output=parts[1], context=parts[0])

    @property
    def name(self) -> str:
        return f"{self.context}{SEPARATOR}{self.output}"

    def __str__(self) -> str:
        return self.name

    @property
    def groups(self) -> tuple[str, str, str]:
        """The three layer groups that this flow uses, and the only ones that it sends gradients to."""
        return GLOBAL_GROUP, f"data.{self.output}", f"context.{self.context}"


def flow_of(setting: str, name: str, groups: Collection[str], modalities: Collection[str]) -> Flow:
    """A flow of a trained model by name.

    Args:
        setting: that gives the name, for errors.
        groups: layer groups that the model has.
        modalities: of its configuration; later stages may have the layers of all of them.

    Raises:
        ConfigError: the name is not a flow's, or there are no layers for it.
    """
    try:
        flow = Flow.parse(name)
    except ValueError as error:
        raise ConfigError(f"{setting}={name}: {error}") from error
    for modality, group in ((flow.output, f"data.{flow.output}"), (flow.context, f"context.{flow.context}")):
        if group not in groups:
            later = "; sample from a later stage" if modality in modalities else ""
            known = meant(modality, modalities)
            raise ConfigError(f"{setting}={name}: this checkpoint has no layers for {modality!r}{later}{known}")
    return flow


def all_flows(modalities: Iterable[str]) -> list[Flow]:
    """Every flow between the given modalities: N modalities give N x N flows."""
    names = list(modalities)
    return [Flow(output, context) for output in names for context in names]


def active_groups(flows: Sequence[Flow]) -> list[str]:
    """Layer groups that a set of flows trains, each once, in order of first use."""
    return list(dict.fromkeys(group for flow in flows for group in flow.groups))


def by_output(flows: Sequence[Flow]) -> dict[str, list[Flow]]:
    """Flows gathered by output modality: those of one entry share their data layers and go through them together."""
    gathered: dict[str, list[Flow]] = {}
    for flow in flows:
        gathered.setdefault(flow.output, []).append(flow)
    return gathered
