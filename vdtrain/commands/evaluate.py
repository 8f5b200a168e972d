"""Measure a trained model: FID and CLIP scores of its flows.

vdtrain evaluate runs/stage3_four_flow data.manifest=data/coco/manifest device=cuda precision=fp16
torchrun --nproc-per-node=8 -m vdtrain evaluate runs/stage3_four_flow ...       # one process per GPU
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from vdtrain.config.command_line import PlainArguments
from vdtrain.config.schema import EvaluateConfig
from vdtrain.run.launch import run_command_on_ranks

USAGE = """\
Usage: vdtrain evaluate CHECKPOINT data.manifest=MANIFEST [SETTING=VALUE ...]
       torchrun --nproc-per-node=N -m vdtrain evaluate CHECKPOINT ...

Measure flows on pairs that the model has not seen: FID, the same distance on CLIP's features, and the CLIP score for
images; the CLIP score for captions. Processes share the samples. Run the same command again after an interruption: it
continues. With more samples= or flows= it adds to the results. docs/evaluation.md explains the figures.

Exit status: 0 done, 75 stopped by SIGTERM or SIGUSR1, 130 stopped by Ctrl-C, 1 an error, 2 a mistake in the settings.

Examples:
  vdtrain evaluate runs/stage3_four_flow data.manifest=data/coco/manifest fid.weights=weights/inception.pth
  vdtrain evaluate weights/versatile_diffusion data.manifest=data/coco/manifest 'flows=[image-to-text]'
  vdtrain evaluate demo/runs-long/stage3_four_flow data=shapes resolution=64 steps=25 guidance_scale=3 samples=200
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vdtrain evaluate`."""

    def action(config: EvaluateConfig, raw_config: DictConfig, launch: dict[str, str]) -> int:
        # Heavy imports come last, so that a mistake on the command line is reported at once.
        from vdtrain.evaluation.processes import run

        return run(config, launch)

    arguments = sys.argv[1:] if argv is None else argv
    plain = PlainArguments(("checkpoint",))
    return run_command_on_ranks(USAGE, "evaluate", EvaluateConfig, action, arguments, plain)
