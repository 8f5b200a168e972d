"""The rates behind a plan's times: measured by `vdtrain bench` where a result fits, else those of the preset."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdtrain.config.schema import HardwareConfig, PlanConfig, RatesConfig, TrainConfig
from vdtrain.errors import ConfigError, described
from vdtrain.files import SHAPE_ERRORS, read_json
from vdtrain.planning.memory import PhaseMemory
from vdtrain.run.surroundings import processor

# Where results are by default. Nothing is amiss if they are not there.
RESULTS = "benchmarks/results"
MEASURED = ("tflops", "memory", "link")
PARTS = ("encode", "forward", "backward")


@dataclass(frozen=True)
class Result:
    """A result of `vdtrain bench`.

    Attributes:
        place: its file, and its name in a file of several.
        settings: of the step that was measured.
        device, name, processes: what it was measured on.
        rates: those of a `RatesConfig` that were measured; `micro_batch_ms` is the time of computing a micro-batch.
    """

    place: str
    settings: Mapping[str, Any]
    resolution: int
    micro_batch: int
    device: str
    name: str
    processes: int
    rates: Mapping[str, float]

    @classmethod
    def of(cls, place: str, content: Any) -> Result:
        """From a result's JSON. It raises one of SHAPE_ERRORS if it has another shape."""
        settings, hardware = dict(content["settings"]), content["hardware"]
        rates = {name: float(value) for name in MEASURED if (value := content["rates"].get(name)) is not None}
        parts = content["parts_ms"]
        rates["micro_batch_ms"] = sum(float(parts[part]) for part in PARTS) / int(settings["micro_batches"])
        if any(not 0 < rate < math.inf for rate in rates.values()):
            raise ValueError("a rate is not above 0")
        sizes = int(settings["resolution"]), int(settings["micro_batch"])
        return cls(
            place, settings, *sizes, str(hardware["device"]), str(hardware["name"]), int(hardware["processes"]), rates
        )

    def fits(self, config: TrainConfig) -> bool:
        """Whether it measured this hardware, computing in the same way."""
        hardware = config.hardware
        wanted = {
            "model": config.model.name,
            "precision": hardware.precision,
            "compile": hardware.compile,
            "channels_last": hardware.channels_last,
            "activation_checkpointing": hardware.activation_checkpointing,
        }
        same = all(self.settings.get(name) == value for name, value in wanted.items())
        return same and self.device == hardware.device and is_named(hardware, self.name)

    def nearness(self, config: TrainConfig, phase: PhaseMemory) -> tuple[float, ...]:
        """How near it is to a phase; the largest is the nearest."""
        return (
            self.resolution == phase.resolution,
            self.settings.get("flows") == config.stage.flows,
            self.settings.get("latents") == config.data.latents,
            -abs(self.micro_batch - phase.micro_batch),
            self.processes,
        )

    @property
    def about(self) -> str:
        """What was measured, and where it stands."""
        return (
            f"measured on {self.processes} x {self.name}: {self.settings.get('stage')} at {self.resolution} pixels, "
            f"micro-batch {self.micro_batch} ({self.place})"
        )


def is_named(hardware: HardwareConfig, name: str) -> bool:
    """Whether a device's own name is that of a preset: every part of `a100_80gb` is in "NVIDIA A100-SXM4-80GB"."""
    if hardware.device == "cpu":
        return name == processor()
    words = re.split(r"[^a-z0-9]+", name.lower())
    return all(part in words for part in hardware.name.lower().split("_"))


def results(rate: str | None) -> tuple[list[Result], bool]:
    """The results that `rate` names, and whether it names them all: a file does, and a folder is one to choose from.

    Raises:
        ConfigError: the path cannot be read, or a file is not such a result.
    """
    if rate is None or (rate == RESULTS and not Path(rate).exists()):
        return [], False
    path = Path(rate)
    if path.is_dir():
        return [each for file in sorted(path.rglob("*.json")) for each in _within(file)], False
    try:
        return [Result.of(rate, read_json(path))], True
    except OSError as error:
        raise ConfigError(f"rate={rate}: {described(error)}") from error
    except SHAPE_ERRORS as error:
        raise ConfigError(f"rate={rate}: not a result of `vdtrain bench`; write one with output={rate}") from error


def _within(file: Path) -> Iterator[Result]:
    """The results in a file: the whole of it, or each entry that is one."""
    try:
        content: Any = read_json(file)
        entries = [("", content), *((f", {name}", each) for name, each in content.items())]
    except (OSError, *SHAPE_ERRORS):
        return
    for name, each in entries:
        try:
            yield Result.of(f"{file}{name}", each)
        except SHAPE_ERRORS:
            continue


def phase_rates(config: PlanConfig, phase: PhaseMemory) -> tuple[RatesConfig, str]:
    """The rates of a phase, and in words where they come from."""
    preset, (found, named) = config.hardware.rates, results(config.rate)
    fitting = found if named else [each for each in found if each.fits(config)]
    if not fitting:
        return preset, f"estimated in hardware={config.hardware.name} from published figures, not measured"
    best = max(fitting, key=lambda each: each.nearness(config, phase))
    # Launches take no longer than the whole micro-batch took.
    least = min(preset.micro_batch_ms, best.rates.get("micro_batch_ms", preset.micro_batch_ms))
    measured: dict[str, Any] = {**best.rates, "micro_batch_ms": least}
    return replace(preset, **measured), best.about
