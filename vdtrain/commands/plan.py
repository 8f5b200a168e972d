"""Estimate the memory, disk space, steps and time of a stage.

vdtrain plan stage=stage3_four_flow hardware=h100 gpus=8
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from vdtrain.config.command import run_command
from vdtrain.config.schema import PlanConfig
from vdtrain.config.validation import check_settings
from vdtrain.planning.memory import GB, StagePlan
from vdtrain.planning.speed import StepTime, step_time, with_measured_rates

USAGE = """\
Usage: vdtrain plan stage=STAGE [GROUP=OPTION ...] [SETTING=VALUE ...]

Estimate for every phase of a stage: the memory of each GPU and what fills it, the largest micro-batch that fits, the
steps, the disk space, and the time of a step and of the phase. The networks are built at full size without memory, and
a micro-batch of every flow passes through them. This takes about a minute and needs no GPU, weights or data.

The times follow from counted operations and bytes and from hardware.rates, or from the rates that `vdtrain bench`
measured (rate=FILE.json).

All groups and settings of `vdtrain train` apply (see `vdtrain train --help`), and those below.

Examples:
  vdtrain plan stage=stage3_four_flow hardware=h100 gpus=8
  vdtrain plan stage=stage1_single_flow hardware=a100_40gb gpus=16 'hardware.micro_batch_size={512: 8}'
  vdtrain plan stage=stage3_four_flow hardware=h200 gpus=64
  vdtrain plan hardware=h200 hardware.zero_stage=2 hardware.activation_checkpointing=blocks format=json
"""


def plan(config: PlanConfig, raw_config: DictConfig) -> int:
    """Print the plan; exit status 0, even if it does not fit."""
    check_settings(config, config.gpus)
    # Heavy imports come after the checks, so that a mistake is reported at once.
    from vdtrain.engine.deepspeed import strategy_line
    from vdtrain.planning.memory import plan_stage

    timed = config if config.rate is None else with_measured_rates(config, config.rate)
    made = plan_stage(config, config.gpus)
    times = [step_time(timed, made, phase) for phase in made.phases]
    if config.format == "json":
        shown = [time and asdict(time) for time in times]
        print(json.dumps({**made.to_dict(), "times": shown}, indent=2))
        return 0
    console = Console(soft_wrap=True, highlight=False)
    hardware = config.hardware
    console.print(
        f"{made.stage} on {made.gpus} x {hardware.name}: {hardware.precision}, "
        f"activation checkpointing: {hardware.activation_checkpointing}"
    )
    console.print(strategy_line(hardware, made.gpus))
    console.print(plan_table(made, [time for time in times if time is not None]))
    trained = sum(made.parameters.values())
    console.print(
        f"{trained:,} trained parameters, {made.frozen_parameters:,} frozen; {made.pairs_per_step} pairs a step"
    )
    console.print(f"a checkpoint is {made.checkpoint / 1e9:.2f} GB, those kept {made.checkpoints / 1e9:.2f} GB")
    console.print("left out of the memory: " + "; ".join(made.left_out))
    if None in times:
        console.print("no times: hardware.rates are not known; give rate=FILE.json, which `vdtrain bench` writes")
    for warning in made.warnings:
        console.print(f"warning: {warning}", style="bold red")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vdtrain plan`."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(USAGE, "plan", PlanConfig, plan, arguments, parts=("gpus", "format", "rate"))


def plan_table(made: StagePlan, times: Sequence[StepTime]) -> Table:
    """GB on each GPU, steps and times, one column for each phase; without times if there are none."""
    table = Table("GB on each GPU", *(f"{phase.resolution} x {phase.resolution}" for phase in made.phases))
    standing = {name.replace("ema", "averaged weights"): size for name, size in asdict(made.standing).items()}
    sizes = [
        {
            **standing,
            "from step to step": made.standing.total,
            "encoding": phase.measured.encoding,
            "kept by forward": phase.measured.kept,
            "forward and backward": phase.measured.peak,
            "exchange in backward": phase.exchange,
            "reduction and update": phase.update,
            "peak": phase.peak,
        }
        for phase in made.phases
    ]
    for name in sizes[0]:
        ends = name in ("frozen", "from step to step", "reduction and update")
        table.add_row(name, *(f"{column[name] / GB:.2f}" for column in sizes), end_section=ends)
    if made.memory is not None:
        table.add_row(f"of {made.memory / GB:.0f} GB", *(f"{phase.peak / made.memory:.0%}" for phase in made.phases))
    table.add_section()
    table.add_row("micro-batch", *(f"{phase.micro_batch} x {phase.micro_batches}" for phase in made.phases))
    if made.memory is not None:
        table.add_row("largest that fits", *(str(phase.largest_micro_batch) for phase in made.phases))
    table.add_row("steps", *(f"{phase.steps:,}" for phase in made.phases))
    table.add_row("pairs", *(f"{phase.samples:,}" for phase in made.phases))
    rows: list[tuple[str, Callable[[StepTime], str]]] = [
        ("TFLOP a step", lambda time: f"{time.flops / 1e12:,.4g}"),
        ("ms of computing", lambda time: f"{time.compute * 1e3:,.1f}"),
        ("ms of the update", lambda time: f"{time.update * 1e3:,.1f}"),
        ("ms of exchange", lambda time: f"{time.exchange * 1e3:,.1f}"),
        ("of which exposed", lambda time: f"{time.exposed * 1e3:,.1f}"),
        ("ms a step", lambda time: f"{time.seconds * 1e3:,.1f}"),
        ("pairs/s", lambda time: f"{time.pairs_per_second:,.1f}"),
        ("days", lambda time: f"{time.days:,.2f}"),
        ("GPU hours", lambda time: f"{time.gpu_hours:,.0f}"),
    ]
    if times:
        table.add_section()
    for name, text in rows if times else []:
        table.add_row(name, *map(text, times))
    for column in table.columns[1:]:
        column.justify = "right"
    return table
