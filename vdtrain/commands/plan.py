"""Estimate the memory, disk space, steps, time and cost of a stage, or of a whole curriculum."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from omegaconf import DictConfig
from rich.console import Console

from vdtrain.config.command import run_command
from vdtrain.config.compose import compose, to_object
from vdtrain.config.fields import check_values
from vdtrain.config.schema import PlanConfig
from vdtrain.config.validation import check_settings
from vdtrain.errors import ConfigError

USAGE = """\
Usage: vdtrain plan stage=STAGE [GROUP=OPTION ...] [SETTING=VALUE ...]
       vdtrain plan curriculum [GROUP=OPTION ...] [SETTING=VALUE ...]

Estimate for every phase of a stage: the memory of each GPU and what fills it, the largest micro-batch that fits, the
steps, the disk space, the time of a step, and days, GPU hours and cost. `curriculum` adds up all stages. It needs no
GPU, weights or data.

The operations and bytes are those of the networks at full size. They were counted before for the stages of conf/; for
other models and flows a micro-batch of every flow passes through the networks without memory, which takes about a
minute. The times follow from them and from the rates that `vdtrain bench` measured on this hardware (rate=FILE.json,
or a folder of such files), else from hardware.rates, which are estimates. The plan says which it took.

All groups and settings of `vdtrain train` apply (see `vdtrain train --help`), and those below.

Examples:
  vdtrain plan stage=stage3_four_flow hardware=h100 gpus=8
  vdtrain plan curriculum hardware=h200 gpus=64 price_per_gpu_hour=3
  vdtrain plan stage=stage1_single_flow hardware=a100_40gb gpus=16 'hardware.micro_batch_size={512: 8}'
  vdtrain plan stage=stage3_four_flow hardware=h200 gpus=64
  vdtrain plan hardware=h200 hardware.zero_stage=2 hardware.activation_checkpointing=blocks format=json
"""
PARTS = ("gpus", "format", "rate", "price_per_gpu_hour", "curriculum", "hardware.rates")
CURRICULUM = "curriculum"


def plan(config: PlanConfig, raw_config: DictConfig) -> int:
    """Print the plan of a stage; exit status 0, even if it does not fit."""
    check_settings(config, config.gpus)
    # Heavy imports come after the checks, so that a mistake is reported at once.
    from vdtrain.planning.tables import Bill, show_stage

    bill = Bill.of(config)
    if config.format == "json":
        print(json.dumps(bill.to_dict(), indent=2))
    else:
        show_stage(Console(soft_wrap=True, highlight=False), config.hardware, bill)
    return 0


def plan_curriculum(words: Sequence[str], config: PlanConfig, raw_config: DictConfig) -> int:
    """Print the plan of all stages.

    Args:
        words: the settings of the command line, which apply to every stage.
    """
    if chosen := next((word for word in words if word.startswith(("stage=", "run_dir="))), None):
        raise ConfigError(f"{chosen}: every stage of a curriculum has its own; choose stages with curriculum=[...]")
    if not config.curriculum:
        raise ConfigError("curriculum=[]: names no stage; give some, such as curriculum=[stage3_four_flow]")
    stages = [to_object(compose("plan", [f"stage={stage}", *words]), PlanConfig) for stage in config.curriculum]
    for each in stages:
        try:
            check_values(each)
            check_settings(each, each.gpus)
        except ConfigError as error:
            raise ConfigError(f"{each.stage.name}: {error}") from error
    from vdtrain.planning.tables import Bill, show_curriculum, sums

    bills = [Bill.of(each) for each in stages]
    if config.format == "json":
        print(json.dumps({"stages": [bill.to_dict() for bill in bills], **sums(bills)}, indent=2))
    else:
        show_curriculum(Console(soft_wrap=True, highlight=False), config.hardware, bills)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain plan`; returns its exit status."""
    words = [word for word in arguments if word != CURRICULUM]
    settings = [word for word in words if not word.startswith("-")]
    action = partial(plan_curriculum, settings) if CURRICULUM in arguments else plan
    return run_command(USAGE, "plan", PlanConfig, action, words, parts=PARTS)
