"""Train one stage of the curriculum.

vdtrain train stage=stage3_four_flow                                        # one process
torchrun --nproc-per-node=8 -m vdtrain train stage=stage3_four_flow         # one process per GPU
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import check
from vdtrain.run.launch import run_command_on_ranks
from vdtrain.run.signals import SCHEDULER_SIGNALS, StopSignal

USAGE = """\
Usage: vdtrain train stage=STAGE [GROUP=OPTION ...] [SETTING=VALUE ...]
       torchrun --nproc-per-node=N -m vdtrain train stage=STAGE ...

Train one stage of the curriculum. A stage continues from its own latest checkpoint in run_dir; a new one starts from
stage.init_from, the stage before it. Run the same command again after any interruption.

Exit status: 0 the stage is complete, 75 stopped by SIGTERM or SIGUSR1 and saved, 130 by Ctrl-C and saved, 1 an error,
2 a mistake in the settings.

  --help              this text
  --cfg job           print the configuration and stop (--resolve fills the interpolations in)

Examples:
  vdtrain train stage=stage1_single_flow --cfg job
  torchrun --nproc-per-node=8 -m vdtrain train stage=stage2_dual_flow hardware=h100 run_dir=/scratch/stage2
  torchrun --nproc-per-node=2 -m vdtrain train stage=stage1_single_flow model=tiny data=shapes hardware=cpu

Settings (the whole list: --cfg job):
  stage.learning_rate, stage.global_batch_size, stage.flows, stage.init_from
  stage.gradient_scales.global, .data.image, .context.text ...   factor on a layer group's step
  stage.samples_scale              0.01 trains one per cent of every phase, and warms up in one per cent of the samples
  model.schedule=released|paper    noise schedule of the released code, or with the betas that the paper prints
  hardware.micro_batch_size, hardware.zero_stage, hardware.precision
  tracking.mode, .project, .entity  of W&B; without them WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY
  run_dir, seed, log_every_steps, ema.enabled, ema.length, ema.decay
  checkpoint.every_steps, checkpoint.keep, checkpoint.keep_every_steps, watchdog_seconds
  hydra.searchpath=[FOLDER]                                     finds FOLDER/model/NAME.yaml as model=NAME, and so on
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vdtrain train`."""
    arguments = sys.argv[1:] if argv is None else argv

    def action(config: TrainConfig, document: DictConfig, launch: dict[str, str]) -> int:
        check(config, int(launch["WORLD_SIZE"]))
        # Heavy imports come after the checks, so that a mistake is said at once.
        from vdtrain.run import session

        overrides = [argument for argument in arguments if not argument.startswith("-")]
        return session.run(config, document, int(launch["RANK"]), stop, overrides)

    # From now on: the imports take long enough for a signal to come between. A Ctrl-C still ends them.
    stop = StopSignal(SCHEDULER_SIGNALS)
    status = run_command_on_ranks(USAGE, "train", TrainConfig, action, arguments)
    if stop.number:
        stop.ignore()
    else:
        stop.restore()
    return status
