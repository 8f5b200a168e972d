"""Check the configuration and the environment before training: one process, on the machine that will train."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.schema import PreflightConfig
from vdtrain.errors import ConfigError, printable
from vdtrain.run.elastic import world_size

USAGE = """\
Usage: vdtrain preflight stage=STAGE [GROUP=OPTION ...] [SETTING=VALUE ...]

Check in one process, without a GPU, whether a stage can be trained, and print every problem with its remedy: the
configuration, the checkpoint that the stage starts from, some of the shards, a batch size that divides, disk space for
the checkpoints, Weights & Biases. This takes seconds: of a checkpoint, only its record and the sizes of its files are
checked. Exit status 0 without problems, else 2.

All groups and settings of `vdtrain train` apply (see `vdtrain train --help`), and those below.

Examples:
  vdtrain preflight stage=stage2_dual_flow hardware=h100 ranks=16 run_dir=/scratch/stage2
  vdtrain preflight stage=stage1_single_flow model=tiny data=shapes hardware=cpu tracking=offline ranks=2
"""


def rank_count(setting: int | None, environment: Mapping[str, str] = os.environ) -> int:
    """Number of processes that will train: the setting, or the number of the launcher.

    Raises:
        ConfigError: it is not a positive integer.
    """
    name, value = "ranks", str(setting)
    if setting is None:
        name = next((name for name in ("WORLD_SIZE", "SLURM_NTASKS") if environment.get(name)), "")
        value = environment.get(name, "1")
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value}; set ranks=N, the number of processes")
    return int(value)


def preflight(config: PreflightConfig, raw_config: DictConfig) -> int:
    """Print the result of every check; exit status 0, or 2 if one failed."""
    started = config.ranks is None and config.gpus is not None
    ranks = world_size(config) if started else rank_count(config.ranks)
    from vdtrain.training.checks import ERROR, checks

    wrong = 0
    for check in checks(config, raw_config, ranks):
        failed = check.kind == ERROR
        wrong += failed
        print(f"{check.kind}: {printable(check.line)}", file=sys.stderr if failed else sys.stdout, flush=True)
    return 2 if wrong else 0


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain preflight`; returns its exit status."""
    return run_command(USAGE, "preflight", PreflightConfig, preflight, arguments, parts=("ranks",), checked=False)
