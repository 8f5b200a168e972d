"""Train one stage of the curriculum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import check
from vdtrain.files import check_output
from vdtrain.run.ranks import launch_variables, run_command_on_ranks
from vdtrain.run.signals import SCHEDULER_SIGNALS, StopSignal

USAGE = """\
Usage: vdtrain train stage=STAGE [GROUP=OPTION ...] [SETTING=VALUE ...]

Train one stage of the curriculum. A stage continues from its own latest checkpoint in run_dir. A new stage starts from
stage.init_from, the stage before it. Run the same command again after any interruption.

gpus=N starts a process on each of N GPUs, or N on the CPU. On several nodes add nnodes= and rendezvous=, or let srun or
torchrun start the processes (docs/launching.md).

Exit status: 0 the stage is complete, 75 stopped and saved, by SIGTERM, SIGUSR1 or data that cannot be read for now,
130 stopped by Ctrl-C and saved, 1 an error, 2 a mistake in the settings.

model.schedule=released|paper sets the noise schedule of the released code, or the betas that the paper prints.
hydra.searchpath=[FOLDER] adds options of your own: FOLDER/model/NAME.yaml becomes model=NAME, and so on.

Examples:
  vdtrain train stage=stage1_single_flow --cfg job
  vdtrain train stage=stage2_dual_flow gpus=8 hardware=h100 run_dir=/scratch/stage2
  vdtrain train stage=stage1_single_flow gpus=2 model=tiny data=shapes hardware=cpu
"""


def checked(config: TrainConfig, processes: int) -> TrainConfig:
    """The settings, which fit each other and the number of processes; the run folder can be written."""
    check(config, processes)
    # Of several nodes one may lack the folder. They find that out together when they lock it.
    if config.nnodes == 1 and launch_variables()["WORLD_SIZE"] == "1":
        check_output(Path(config.run_dir), f"run_dir={config.run_dir}")
    return config


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain train`; returns its exit status."""

    def action(config: TrainConfig, raw_config: DictConfig, launch: dict[str, str]) -> int:
        # Heavy imports come after the checks, so that a mistake is reported at once.
        from vdtrain.training import session

        overrides = [argument for argument in arguments if not argument.startswith("-")]
        return session.run(config, raw_config, int(launch["RANK"]), stop, overrides)

    # Before the slow imports, during which a signal may arrive. Ctrl-C still ends the command there.
    stop = StopSignal(SCHEDULER_SIGNALS)
    status = run_command_on_ranks(USAGE, "train", TrainConfig, action, arguments, prepare=checked)
    if stop.number:
        stop.ignore()
    else:
        stop.restore()
    return status
