"""Predicts how long a stage takes: counted operations and bytes, by the rates of the hardware.

A rate is measured by `vdtrain bench` where a result fits, and is the preset's otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdtrain.config.schema import (
    DEEPSPEED,
    REPLICATED,
    SHARDED,
    HardwareConfig,
    PlanConfig,
    RatesConfig,
    TrainConfig,
)
from vdtrain.config.validation import stage_flows
from vdtrain.errors import ConfigError, described
from vdtrain.files import SHAPE_ERRORS, read_json
from vdtrain.flows import Flow, by_output
from vdtrain.planning.memory import FLOAT32, GB, PhaseMemory, StagePlan, compute_bytes, strategy
from vdtrain.tracking.surroundings import processor

# Where results are by default. Nothing is amiss if they are not there.
RESULTS = "benchmarks/results"
MEASURED = ("tflops", "memory", "link")
# Settings of the hardware that decide how a micro-batch is computed.
COMPUTING = ("precision", "activation_checkpointing", "compile", "channels_last", "cuda_graphs")
PARTS = ("encode", "forward", "backward")


@dataclass(frozen=True)
class Result:
    """A result of `vdtrain bench`.

    Attributes:
        place: its file, and its name in a file of several.
        device, name, processes: what it was measured on.
        outputs: what its flows generate.
        rates: those of a `RatesConfig` that were measured; `micro_batch_ms` is the time of computing a micro-batch.
    """

    place: str
    settings: Mapping[str, Any]
    outputs: frozenset[str]
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
        outputs = frozenset(Flow.parse(name).output for name in settings["flows"])
        sizes = int(settings["resolution"]), int(settings["micro_batch"])
        device, name = str(hardware["device"]), str(hardware["name"])
        return cls(place, settings, outputs, *sizes, device, name, int(hardware["processes"]), rates)

    def fits(self, config: TrainConfig) -> bool:
        """Whether it measured this hardware, computing in the same way."""
        hardware = config.hardware
        # Results from before a setting existed were measured without what it turns on.
        same = all(self.settings.get(name, False) == getattr(hardware, name) for name in COMPUTING)
        same = same and self.settings.get("model") == config.model.name
        return same and self.device == hardware.device and is_named(hardware, self.name)

    def nearness(self, config: TrainConfig, phase: PhaseMemory) -> tuple[float, ...]:
        """How near it is to a phase; the largest is the nearest."""
        return (
            self.resolution == phase.resolution,
            self.settings.get("flows") == config.stage.flows,
            # Flows to text have many small kernels, whose launches take longer than they do.
            self.outputs == set(by_output(stage_flows(config))),
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


# Bytes that an update reads and writes for each weight of a process's partition: the norm reads a gradient (4), AdamW
# reads and writes weight, gradient and two moments (32), and the module's copy reads a weight (4) and writes one.
UPDATED, COPIED = 36, 4
# The average is read and written, beside the weight.
AVERAGED = 12
# Of every gradient that a process holds: DeepSpeed joins, scales and copies back a buffer, and all are zeroed.
JOINED, ZEROED = 24, 4
# Of the operations of a micro-batch without its encoding.
BACKWARD = 2 / 3


@dataclass(frozen=True)
class StepTime:
    """The time of one phase.

    Attributes:
        flops: floating-point operations of a step, over all GPUs.
        compute: seconds of encoding, forward and backward.
        update: seconds of the passes over gradients, weights and moments.
        exchange: seconds of the collectives.
        exposed: of them, those in which nothing is computed.
    """

    flops: float
    compute: float
    update: float
    exchange: float
    exposed: float
    seconds: float
    pairs_per_second: float
    days: float
    gpu_hours: float


def step_time(config: TrainConfig, plan: StagePlan, phase: PhaseMemory) -> StepTime | None:
    """Predict a phase; None if the hardware's rates are not known.

    The waits for data and the launches within the update are left out.
    """
    rates, gpus = config.hardware.rates, plan.gpus
    nodes = math.ceil(gpus / rates.gpus_per_node)
    if rates.tflops is None or rates.memory is None or (gpus > 1 and rates.link is None):
        return None
    if nodes > 1 and rates.network is None:
        return None
    micro_batch = max(phase.measured.flops / (rates.tflops * 1e12), rates.micro_batch_ms / 1e3)
    compute = phase.micro_batches * micro_batch
    update = updated_bytes(config, plan) / (rates.memory * GB)
    exchange = sum(crossing(rates, gpus, size) for size in exchanged_bytes(config, plan, phase))
    encoding = micro_batch * phase.measured.encoding_flops / max(1, phase.measured.flops)
    early, gathered = (crossing(rates, gpus, size) for size in hidden_bytes(config, plan))
    hidden = min(early, BACKWARD * (micro_batch - encoding)) + min(gathered, encoding)
    exposed = exchange - hidden
    seconds = compute + update + exposed
    hours = phase.steps * seconds / 3600
    return StepTime(
        flops=float(phase.measured.flops * phase.micro_batches * gpus),
        compute=compute,
        update=update,
        exchange=exchange,
        exposed=exposed,
        seconds=seconds,
        pairs_per_second=plan.pairs_per_step / seconds,
        days=hours / 24,
        gpu_hours=hours * gpus,
    )


def crossing(rates: RatesConfig, gpus: int, size: float) -> float:
    """Seconds in which a reduce-scatter or an all-gather moves a buffer of `size` bytes, on known rates.

    A GPU receives the parts of all others over its link, and a node those of other nodes over its network, at once.
    """
    nodes = math.ceil(gpus / rates.gpus_per_node)
    slowest = [(count - 1) / count / rate for count, rate in ((gpus, rates.link), (nodes, rates.network)) if rate]
    return max(slowest, default=0.0) * size / GB


def updated_bytes(config: TrainConfig, plan: StagePlan) -> float:
    """Bytes that the update of a step reads and writes on one GPU."""
    weights, kind = sum(plan.parameters.values()), strategy(config, plan.gpus)
    own = weights / plan.gpus
    gradients = plan.standing.gradients / FLOAT32
    passes = ZEROED + (JOINED if kind == DEEPSPEED and config.hardware.zero_stage == 1 else 0)
    average = AVERAGED * own if config.ema.enabled else 0
    partition = weights if kind == REPLICATED else own
    # In float32 the masters are the module's weights, unless DeepSpeed keeps both.
    copied = COPIED + compute_bytes(config) if kind == DEEPSPEED or compute_bytes(config) < FLOAT32 else 0
    return (UPDATED + copied) * partition + average + passes * gradients


def exchanged_bytes(config: TrainConfig, plan: StagePlan, phase: PhaseMemory) -> list[float]:
    """Bytes of each buffer that crosses the links once in a step; an all-reduce crosses them twice.

    Gradients travel in float32, weights in the compute dtype.
    """
    weights, kind = sum(plan.parameters.values()), strategy(config, plan.gpus)
    gradients, gathered = float(FLOAT32 * weights), float(compute_bytes(config) * weights)
    if kind == REPLICATED:
        return [gradients] * 2
    if kind == SHARDED:
        return [gradients, gathered]
    return [gradients] * 2 * (phase.micro_batches if config.hardware.zero_stage == 2 else 1) + [gathered]


def hidden_bytes(config: TrainConfig, plan: StagePlan) -> tuple[float, float]:
    """Bytes that cross the links during backward, and those of weights gathered while the next step encodes.

    Backward begins with the last output modality, whose data layers then have all their gradients.
    """
    kind, outputs = strategy(config, plan.gpus), list(by_output(stage_flows(config)))
    if kind == DEEPSPEED:
        return 0.0, 0.0
    early = FLOAT32 * sum(plan.parameters[f"data.{output}"] for output in outputs[1:])
    if kind == REPLICATED:
        return float(2 * early), 0.0
    return float(early), float(compute_bytes(config) * sum(plan.parameters.values()))
