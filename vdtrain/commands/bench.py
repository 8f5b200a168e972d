"""Measure the training step of a stage, without data or weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from vdtrain.config.schema import BenchConfig, PhaseConfig
from vdtrain.config.validation import check_settings
from vdtrain.errors import ConfigError
from vdtrain.files import refuse_existing
from vdtrain.run.ranks import PROCESSES, run_command_on_ranks

USAGE = """\
Usage: vdtrain bench stage=STAGE [GROUP=OPTION ...] [SETTING=VALUE ...]

Measure the step that `vdtrain train` makes: pairs per second, the time of each part of a step, FLOP/s beside those of a
matrix product on the same device, peak memory beside what `vdtrain plan` says, and on a GPU the calls that wait for it.
All networks have their configured size and random weights, and the batches are random, so that it needs no data and no
weights. The output holds everything as JSON; `vdtrain plan rate=FILE.json` predicts times from it. gpus=N measures N
processes, one on each GPU.

All groups and settings of `vdtrain train` apply (see `vdtrain train --help`), and those below.

Examples:
  vdtrain bench stage=stage3_four_flow hardware=h200 micro_batches=1 output=h200.json profile=true  # needs a GPU
  vdtrain bench stage=stage1_single_flow model=tiny hardware=cpu micro_batches=1 output=cpu.json
"""
PARTS = (*PROCESSES, "resolution", "warmup_steps", "timed_steps", "micro_batches", "profile", "output", "overwrite")
# So many that no phase ends; they are not made.
STEPS = 1_000_000


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain bench`; returns its exit status."""

    def action(config: BenchConfig, raw_config: DictConfig, launch: dict[str, str]) -> int:
        if config.profile and config.output is None:
            raise ConfigError("profile=true: the trace is written beside the output; give output=FILE.json")
        if config.output is not None:
            refuse_existing(Path(config.output), f"output={config.output}", config.overwrite)
        # Heavy imports come after the checks, so that a mistake is reported at once.
        from vdtrain.training.bench import run

        return run(config, raw_config, [word for word in arguments if not word.startswith("-")])

    return run_command_on_ranks(USAGE, "bench", BenchConfig, action, arguments, parts=PARTS, prepare=prepared)


def prepared(config: BenchConfig, ranks: int) -> BenchConfig:
    """The settings that are measured: from random weights, one phase at the benchmark's resolution and batch."""
    stage = config.stage
    if stage.phases:
        resolution = config.resolution or stage.phases[0].resolution
        batch, sizes = stage.global_batch_size, config.hardware.micro_batch_size
        if config.micro_batches is not None and resolution in sizes:
            batch = ranks * sizes[resolution] * config.micro_batches
        phases = [PhaseConfig(resolution, STEPS * batch)]
        stage = replace(stage, init_from=None, global_batch_size=batch, phases=phases, samples_scale=1.0)
        config = replace(config, stage=stage, tracking=replace(config.tracking, mode="disabled"))
    check_settings(config, ranks)
    return config
