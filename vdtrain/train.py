"""Train one stage of the curriculum.

vdtrain train stage=stage3_four_flow                                        # one process
torchrun --nproc-per-node=8 -m vdtrain.train stage=stage3_four_flow         # one process per GPU
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vdtrain.compose import ConfigError, run_verb
from vdtrain.config import TrainConfig
from vdtrain.launch import launch_variables
from vdtrain.validation import check, phase_steps

USAGE = """\
Usage: vdtrain train stage=STAGE [GROUP=OPTION ...] [SETTING=VALUE ...]
       torchrun --nproc-per-node=N -m vdtrain.train stage=STAGE ...

Train one stage of the curriculum. A stage continues from its own latest checkpoint in run_dir; a new one starts from
stage.init_from, the stage before it. Run the same command again after any interruption.

  --help              this text
  --cfg job           print the configuration and stop (--resolve fills the interpolations in)

Examples:
  vdtrain train stage=stage1_single_flow --cfg job
  torchrun --nproc-per-node=8 -m vdtrain.train stage=stage2_dual_flow hardware=h100 run_dir=/scratch/stage2
  torchrun --nproc-per-node=2 -m vdtrain.train stage=stage1_single_flow model=tiny data=shapes hardware=cpu

Settings (the whole list: --cfg job):
  stage.learning_rate, stage.global_batch_size, stage.flows, stage.init_from
  stage.gradient_scales.global, .data.image, .context.text ...   factor on a layer group's step
  stage.samples_scale                                           0.01 trains one per cent of every phase
  hardware.micro_batch_size, hardware.zero_stage, hardware.precision
  run_dir, seed, log_every_steps, checkpoint.every_steps, checkpoint.keep, ema.enabled, ema.decay
  hydra.searchpath=[FOLDER]                                     finds FOLDER/model/NAME.yaml as model=NAME, and so on
"""


def train(config: TrainConfig, document: DictConfig, launch: Mapping[str, str]) -> int:
    """Check the configuration, then train; exit status 0 if the stage is complete, 128 + SIGTERM if stopped before."""
    check(config, int(launch["WORLD_SIZE"]))
    first = launch["RANK"] == "0"
    # Heavy imports come after the checks, so that a mistake is said at once.
    from vdtrain.training.curriculum import find_start

    start = find_start(config, document)
    if start.resume is not None and _is_complete(config, start.resume):
        if first:
            print(f"{config.stage.name} is complete: {start.resume}")
        return 0
    run_dir = Path(config.run_dir)
    if first:
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(document, run_dir / "config.yaml", resolve=True)
        origin = (
            f"continues from {start.resume}" if start.resume else f"starts from {start.weights or 'random weights'}"
        )
        print(f"{config.stage.name} {origin}", flush=True)
    return _run(config, document, start)


def _run(config: TrainConfig, document: DictConfig, start: object) -> int:
    import torch

    from vdtrain.training import distributed
    from vdtrain.training.curriculum import Start
    from vdtrain.training.trainer import Trainer

    assert isinstance(start, Start)
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    try:
        place = distributed.start(config.hardware.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        complete = Trainer(config, document, start, place).run()
    finally:
        distributed.finish()
    return 0 if complete else 128 + signal.SIGTERM


def _is_complete(config: TrainConfig, checkpoint: Path) -> bool:
    from vdtrain.training.checkpoints import read_trainer_state

    total = sum(phase_steps(config, phase) for phase in config.stage.phases)
    return int(read_trainer_state(checkpoint)["state"]["step"]) >= total


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vdtrain train`."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        launch = launch_variables()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def action(config: TrainConfig, document: DictConfig) -> int:
        return train(config, document, launch)

    return run_verb(USAGE, "train", TrainConfig, action, arguments, speaks=launch["RANK"] == "0")


if __name__ == "__main__":
    sys.exit(main())
