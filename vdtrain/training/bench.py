"""Measures the real step of a stage on this process's device: `vdtrain bench`.

The batches are synthetic: random images or moments, and captions as long as those of the web.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from vdtrain.config.compose import ConfigError
from vdtrain.config.schema import BenchConfig
from vdtrain.config.validation import micro_batches
from vdtrain.data.latents import MODALITY
from vdtrain.data.loading import Prefetcher
from vdtrain.data.synthetic import SyntheticStream
from vdtrain.files import atomic_write
from vdtrain.models.execution import forget_passes, plain_passes
from vdtrain.models.frozen_weights import without_weights
from vdtrain.planning.dry_run import with_stand_ins
from vdtrain.planning.memory import plan_stage
from vdtrain.planning.speed import COMPUTING
from vdtrain.run import distributed
from vdtrain.tracking.reporting import memory_gb
from vdtrain.tracking.speed import (
    BACKWARD,
    ENCODE,
    EXCHANGE,
    FORWARD,
    OPTIMISER,
    PARTS,
    OperatorCount,
    StepClock,
    copy_rate,
    matmul_rate,
)
from vdtrain.tracking.surroundings import commit, processor, versions
from vdtrain.training.agreement import StepSync
from vdtrain.training.build import build_trainer
from vdtrain.training.start import Start
from vdtrain.training.trainer import Trainer

GB = 1e9
# Frames of the stack of a wait that are kept, from the innermost of this package outwards.
FRAMES = 4
# Rows of the table of kernels that are kept and that are printed, and the length of their names.
ROWS, SHOWN_ROWS, NAME = 60, 25, 160
# Rows of the table of copies that are printed.
SHOWN_COPIES = 8
# The first pattern that occurs in a kernel's name decides.
KERNEL_KINDS = (
    ("triton", r"^triton_"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("collective", r"nccl"),
    ("convolution", r"conv|fprop|dgrad|wgrad|winograd|implicit_gemm"),
    ("matrix product", r"gemm|nvjet|cutlass|splitkreduce|gemv"),
    ("layout", r"nchwtonhwc|nhwctonchw|transpose|catarray"),
    ("optimiser", r"adam|multi_tensor"),
    ("normalisation", r"norm|rowwisemoments"),
    ("copy or fill", r"memcpy|memset|copy|fill"),
    ("random numbers", r"distribution|philox|random"),
    ("elementwise", r"elementwise|reduce_kernel"),
)


class Result:
    """Prints each part as it is known, and rewrites the output, so that a run cut short keeps what it measured.

    Args:
        output: JSON file; None for none.
        shown: whether this process prints and writes.
    """

    def __init__(self, output: Path | None, shown: bool) -> None:
        self.values: dict[str, Any] = {}
        self._output, self._shown = output, shown

    def add(self, name: str, value: Any, text: str) -> None:
        """Add a part, and print its line."""
        self.values[name] = value
        self.say(name, text)
        if self._shown and self._output is not None:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._output) as draft:
                draft.write_text(json.dumps(self.values, indent=2) + "\n", encoding="utf-8")

    def say(self, name: str, text: str) -> None:
        """Print a line that is not kept."""
        if self._shown:
            print(f"{name.replace('_', ' '):<12}{text}", flush=True)


def run(config: BenchConfig, raw_config: DictConfig, words: Sequence[str]) -> int:
    """Measure a stage of one phase, whose settings have been checked; the exit status.

    Raises:
        ConfigError: this process has no device, or a network cannot be built or does not fit into the GPU.
    """
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    place = distributed.start(config.hardware.device)
    result = Result(None if config.output is None else Path(config.output), place.rank == 0)
    try:
        with tempfile.TemporaryDirectory(prefix="vdtrain-bench-") as folder:
            config = replace(config, run_dir=folder, model=with_stand_ins(config.model))
            _about(config, place, result, words)
            before, began = memory_gb(place.device), time.monotonic()
            with without_weights():
                trainer = build_trainer(config, raw_config, Start(), place, draw_on=place.device)
            try:
                result.say("built", f"random weights in {time.monotonic() - began:.1f} s")
                # What a process on a CPU takes before it has a model is no part of the plan.
                _measure(trainer, config, result, before if place.device.type == "cpu" else 0.0)
            finally:
                trainer.close()
        distributed.barrier()
        return 0
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"hardware.micro_batch_size={config.hardware.micro_batch_size}: does not fit into the GPU's memory; choose "
            "a smaller one, as `vdtrain plan` shows"
        ) from error
    finally:
        distributed.finish()


def _about(config: BenchConfig, place: distributed.RankInfo, result: Result, words: Sequence[str]) -> None:
    (phase,) = config.stage.phases
    count = micro_batches(config, phase.resolution, place.world_size)
    batch = config.stage.global_batch_size
    settings = {
        "words": list(words),
        "stage": config.stage.name,
        "flows": config.stage.flows,
        "model": config.model.name,
        "resolution": phase.resolution,
        "latents": config.data.latents,
        "zero_stage": config.hardware.zero_stage,
        **{name: getattr(config.hardware, name) for name in COMPUTING},
        "pairs": batch,
        "micro_batch": batch // place.world_size // count,
        "micro_batches": count,
        "warmup_steps": config.warmup_steps,
        "timed_steps": config.timed_steps,
    }
    result.add(
        "settings",
        settings,
        f"{config.stage.name}, model={config.model.name}, {phase.resolution} pixels, latents {config.data.latents}, "
        f"{config.hardware.precision}, ZeRO {config.hardware.zero_stage}, compile={config.hardware.compile}; "
        f"{batch} pairs a step, on each process {count} x {settings['micro_batch']}",
    )
    hardware = {
        "name": torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else processor(),
        "device": place.device.type,
        "processes": place.world_size,
        "threads": torch.get_num_threads(),
    }
    result.add("hardware", hardware, f"{place.world_size} x {hardware['name']}, {hardware['threads']} threads each")
    found = versions("torch", "deepspeed")
    result.values["commit"] = commit()
    text = ", ".join(f"{name} {number}" for name, number in found.items())
    result.add("versions", found, f"{text}, commit {result.values['commit'] or 'unknown'}")


class _Steps:
    """Makes steps as a run makes them, but for saves and log lines."""

    def __init__(self, trainer: Trainer, config: BenchConfig) -> None:
        self.trainer, (self.phase,) = trainer, config.stage.phases
        place, side = trainer.place, self.phase.resolution
        moments = None
        if config.data.latents == "cached":
            channels, *size = trainer.objective.frozen.latent_shape(MODALITY, (side, side))
            # A mean and a variance for each.
            moments = (2 * channels, *size)
        rows = config.stage.global_batch_size // place.world_size
        stream = SyntheticStream(rows, side, seed=config.seed, rank=place.rank, moments=moments)
        self.batches = Prefetcher(stream, trainer.objective.prepare)
        self._sync = StepSync(trainer.flow_names, place.device, trainer.engine.groups)

    def make(self, clock: StepClock) -> float:
        """Make a step; the seconds that it waited for its batch."""
        began = time.monotonic()
        batch = next(self.batches)
        waited = time.monotonic() - began
        done = self.trainer.step(batch, self.phase, clock)
        self._sync.collect()
        self._sync.submit(self.trainer.state.step, done.losses, done.report, 0, quarters=done.quarters)
        return waited

    def finish(self) -> None:
        """Wait until the last step is over on every process."""
        outcome = self._sync.collect()
        if outcome is not None and not outcome.applied:
            warnings.warn("a loss or a gradient was not finite, so that the step was skipped", stacklevel=1)
        distributed.barrier()


def _measure(trainer: Trainer, config: BenchConfig, result: Result, memory_before: float) -> None:
    steps, device = _Steps(trainer, config), trainer.place.device
    try:
        began = time.monotonic()
        for number in range(config.warmup_steps):
            steps.make(StepClock(device))
            steps.finish()
            result.say("warm-up", f"step {number + 1} of {config.warmup_steps}, {time.monotonic() - began:.1f} s")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        parts = _timed(steps, config, result)
        peak = memory_gb(device) - memory_before
        if config.hardware.cuda_graphs:
            peak += kept_by_graphs(torch.cuda.memory_snapshot()) / GB
        _waits(steps, result)
        if config.profile and config.output is not None:
            _profiled(steps, result, Path(config.output))
        # Last: from a step that is counted on, compiled code runs eagerly. It needs what a recording keeps.
        forget_passes(trainer.engine.module)
        flops = _counted(steps, config, result, parts)
        _rates(trainer, config, result, parts, flops)
        if trainer.place.rank == 0:
            # Without the search for the largest micro-batch.
            hardware = replace(config.hardware, memory_gb=None)
            planned = plan_stage(replace(config, hardware=hardware), trainer.place.world_size).phases[0].peak / GB
            what = "" if device.type == "cuda" else " (all that the process took on top of its libraries)"
            memory = {"peak_gb": peak, "planned_gb": planned}
            result.add("memory", memory, f"peak {peak:.2f} GB{what}, `vdtrain plan` says {planned:.2f} GB")
    finally:
        steps.batches.close()


def kept_by_graphs(segments: Sequence[Mapping[str, Any]]) -> int:
    """Bytes that recorded graphs keep for their replays, and that no tensor holds any more.

    Args:
        segments: as `torch.cuda.memory_snapshot` gives them. The pool (0, 0) is that of no graph.
    """
    pools = (each for each in segments if tuple(each["segment_pool_id"]) != (0, 0))
    kept: int = sum(each["total_size"] - each["allocated_size"] for each in pools)
    return kept


def _timed(steps: _Steps, config: BenchConfig, result: Result) -> dict[str, float]:
    """Time the steps; seconds of each part in a step, the exchange within the others."""
    device, count = steps.trainer.place.device, config.timed_steps
    ends, clock, waited = StepClock(device), StepClock(device), 0.0
    ends.mark(None)
    for _ in range(count):
        waited += steps.make(clock)
        ends.mark("step")
    steps.finish()
    seconds = [duration for _, duration in ends.durations()]
    pairs = config.stage.global_batch_size
    speed = {
        "pairs_per_second": pairs / median(seconds),
        "least": pairs / max(seconds),
        "most": pairs / min(seconds),
        "step_ms": median(seconds) * 1e3,
        "steps_ms": [each * 1e3 for each in seconds],
    }
    result.add(
        "speed",
        speed,
        f"{speed['pairs_per_second']:.2f} pairs/s ({speed['least']:.2f} to {speed['most']:.2f} in {count} steps), "
        f"{speed['step_ms']:,.1f} ms a step",
    )
    return {"data_wait": waited / count, **{part: spent / count for part, spent in clock.seconds().items()}}


def _counted(steps: _Steps, config: BenchConfig, result: Result, parts: dict[str, float]) -> int:
    """Count a step's operations and collectives; moves the time of the collectives to a part of their own.

    Compiled code runs eagerly in this step (`OperatorCount`), and nothing is replayed. So its times give only
    shares.
    """
    clock = StepClock(steps.trainer.place.device)
    with plain_passes(steps.trainer.engine.module), OperatorCount(clock) as count:
        steps.make(clock)
    steps.finish()
    computing, spent = clock.seconds(), 0.0
    exchange = dict.fromkeys(PARTS, 0.0)
    for part, seconds in clock.durations():
        if part == EXCHANGE:
            spent += seconds
        elif part in PARTS:
            exchange[part] += spent
            spent = 0.0
    # The share, since counting slows a step down.
    moved = {part: parts[part] * exchange[part] / (exchange[part] + computing[part]) for part in PARTS}
    parts.update({part: parts[part] - moved[part] for part in PARTS}, exchange=sum(moved.values()))
    ordered = ("data_wait", ENCODE, FORWARD, BACKWARD, EXCHANGE, OPTIMISER)
    times = {part: parts[part] * 1e3 for part in ordered}
    text = ", ".join(f"{part.replace('_', ' ')} {spent:,.1f}" for part, spent in times.items())
    result.add("parts_ms", times, f"{text}; the exchange as if nothing hides it")
    result.add(
        "exchange",
        {"bytes": dict(count.collectives)},
        ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in count.collectives.items()) or "nothing",
    )
    flops: int = count.flops
    return flops


def _rates(trainer: Trainer, config: BenchConfig, result: Result, parts: dict[str, float], flops: int) -> None:
    """The rates that this process reached, and those of its device."""
    device, ranks = trainer.place.device, trainer.place.world_size
    distributed.barrier()
    product = matmul_rate(device, trainer.engine.compute_dtype, seconds=0.5)
    rate = flops / (result.values["speed"]["step_ms"] / 1e3)
    computing = sum(parts[part] for part in (ENCODE, FORWARD, BACKWARD))
    value = {
        "per_step": flops * ranks,
        "tflops": rate / 1e12,
        "matmul_tflops": product / 1e12,
        "share": rate / product,
    }
    result.add(
        "flops",
        value,
        f"{flops * ranks / 1e12:,.3f} TFLOP a step, {rate / 1e12:,.3f} TFLOP/s of a process: {rate / product:.0%} of a "
        f"matrix product's {product / 1e12:,.3f}",
    )
    wire = sum(size * (2 if name == "allreduce" else 1) for name, size in result.values["exchange"]["bytes"].items())
    rates = {
        "tflops": flops / computing / 1e12,
        "memory": copy_rate(device) / GB,
        "link": wire * (ranks - 1) / ranks / parts[EXCHANGE] / GB if ranks > 1 else None,
    }
    link = "" if rates["link"] is None else f", {rates['link']:.2f} GB/s between processes"
    result.add("rates", rates, f"{rates['tflops']:.3f} TFLOP/s computing, memory {rates['memory']:,.1f} GB/s{link}")


def _waits(steps: _Steps, result: Result) -> None:
    """Make a step in which PyTorch reports each call that waits for the GPU."""
    if steps.trainer.place.device.type != "cuda":
        result.add("waits", None, "not known on a CPU")
        return
    found: Counter[str] = Counter()
    with _reported(found):
        steps.make(StepClock(steps.trainer.place.device))
    steps.finish()
    lines = [{"count": count, "stack": stack} for stack, count in found.most_common()]
    result.add("waits", {"count": sum(found.values()), "stacks": lines}, f"{sum(found.values())} in a step")
    for line in lines:
        result.say("", f"{line['count']} x {line['stack']}")


@contextmanager
def _reported(found: Counter[str]) -> Iterator[None]:
    """Inside, count the stacks of all calls that wait for the GPU."""

    def note(message: Any, *_: Any, **__: Any) -> None:
        # Not the remark that the mode itself makes when it is turned on.
        if "called a synchronizing" not in str(message):
            return
        own = [
            frame for frame in traceback.extract_stack() if "vdtrain" in frame.filename and __file__ != frame.filename
        ]
        found[" < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(own[-FRAMES:]))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _profiled(steps: _Steps, result: Result, output: Path) -> None:
    trace = output.with_suffix(".trace.json")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, record_shapes=True) as recorded:
        steps.make(StepClock(steps.trainer.place.device))
        steps.finish()
    if steps.trainer.place.rank == 0:
        recorded.export_chrome_trace(str(trace))
    result.add("trace", str(trace), str(trace))
    _kernels(recorded, result)
    found = copies(recorded)
    result.add("copies", found[:ROWS], f"of operators, {len(found)} kinds; those that take most time:")
    for each in found[:SHOWN_COPIES]:
        result.say("", f"{each['ms']:8.2f} ms {each['calls']:6,} x {each['shape']} {each['within']}")


def copies(recorded: profile) -> list[dict[str, Any]]:
    """What PyTorch's copying operator copied, by shape and by the operators around it; the longest first.

    The names of its kernels say neither. The time is the GPU's, or a CPU's where there is no GPU. A replayed CUDA graph
    calls no operators.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for event in recorded.events():
        if event.name != "aten::copy_":
            continue
        around, parent = list[str](), event.cpu_parent
        while parent is not None:
            around.append(parent.name.removeprefix("autograd::engine::evaluate_function: "))
            parent = parent.cpu_parent
        key = str(event.input_shapes[:1]), " < ".join(around[:FRAMES])
        row = found.setdefault(key, {"shape": key[0], "within": key[1], "calls": 0, "ms": 0.0})
        row["calls"] += 1
        row["ms"] += (event.device_time_total if torch.cuda.is_available() else event.cpu_time_total) / 1e3
    return sorted(found.values(), key=lambda row: row["ms"], reverse=True)


def _kernels(recorded: profile, result: Result) -> None:
    """Sum up a step's kernels by kind, and list those that take most time."""
    rows = [
        {"name": row.key[:NAME], "calls": row.count, "ms": row.self_device_time_total / 1e3}
        for row in recorded.key_averages()
        if row.device_type.name == "CUDA" and row.self_device_time_total
    ]
    if not rows:
        result.add("kernels", None, "not known on a CPU")
        return
    rows.sort(key=lambda row: row["ms"], reverse=True)
    kinds: dict[str, dict[str, Any]] = {}
    for row in rows:
        kind = kinds.setdefault(kernel_kind(row["name"]), {"calls": 0, "ms": 0.0})
        kind["calls"] += row["calls"]
        kind["ms"] += row["ms"]
    text = ", ".join(f"{kind} {found['ms']:,.1f} ({found['calls']:,})" for kind, found in kinds.items())
    busy = sum(row["ms"] for row in rows)
    value = {"busy_ms": busy, "calls": sum(row["calls"] for row in rows), "kinds": kinds, "rows": rows[:ROWS]}
    result.add("kernels", value, f"{busy:,.1f} ms in {value['calls']:,} calls: {text}")
    for row in rows[:SHOWN_ROWS]:
        result.say("", f"{row['ms']:8.2f} ms {row['calls']:6,} x {row['name'][:90]}")


def kernel_kind(name: str) -> str:
    """What a GPU kernel does, by its name."""
    return next((kind for kind, pattern in KERNEL_KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
