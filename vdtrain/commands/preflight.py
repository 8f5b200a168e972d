"""Look, before the GPUs are used, whether a stage can be trained: one process, on the machine that will train.

vdtrain preflight stage=stage3_four_flow hardware=h100 ranks=8
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from vdtrain.config.compose import ConfigError, run_command
from vdtrain.config.schema import PreflightConfig
from vdtrain.errors import printable

USAGE = """\
Usage: vdtrain preflight stage=STAGE [GROUP=OPTION ...] [SETTING=VALUE ...]

Look, on one process and before any GPU is used, whether a stage can be trained, and say everything that is wrong with
its remedy: the configuration, the checkpoint that the stage starts from, shards enough for all loader workers, a batch
that divides, room on the disk for the checkpoints to come, Weights & Biases. It takes seconds: checkpoints are told by
their records and the sizes of their files, and no GPU is asked. Exit status 0 if all is well, 2 if not.

All groups and settings of `vdtrain train`, and:
  ranks=N             processes that will train (default: WORLD_SIZE, else SLURM_NTASKS, else 1; within a step of one
                      task, SLURM_NTASKS is 1)

Examples:
  vdtrain preflight stage=stage2_dual_flow hardware=h100 ranks=16 run_dir=/scratch/stage2
  vdtrain preflight stage=stage1_single_flow model=tiny data=shapes hardware=cpu tracking=offline ranks=2
"""


def rank_count(setting: int | None, environment: Mapping[str, str] = os.environ) -> int:
    """Number of processes that will train: the setting, or what the launcher says.

    Raises:
        ConfigError: it is no number above 0.
    """
    name, value = "ranks", str(setting)
    if setting is None:
        name = next((name for name in ("WORLD_SIZE", "SLURM_NTASKS") if environment.get(name)), "")
        value = environment.get(name, "1")
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value}: is to be the number of processes that will train; give ranks=N")
    return int(value)


def preflight(config: PreflightConfig, document: DictConfig) -> int:
    """Print what was found; exit status 0, or 2 if something is wrong."""
    ranks = rank_count(config.ranks)
    from vdtrain.training.readiness import ERROR, findings

    wrong = 0
    for finding in findings(config, document, ranks):
        failed = finding.kind == ERROR
        wrong += failed
        print(f"{finding.kind}: {printable(finding.line)}", file=sys.stderr if failed else sys.stdout, flush=True)
    return 2 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vdtrain preflight`."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(USAGE, "preflight", PreflightConfig, preflight, arguments)
