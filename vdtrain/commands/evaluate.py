"""Measure a trained model, or images and captions of another: FID, CLIP scores, BLEU and more."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from vdtrain.config.command_line import PlainArguments
from vdtrain.config.command_schema import EvaluateConfig
from vdtrain.run.ranks import run_command_on_ranks

USAGE = """\
Usage: vdtrain evaluate CHECKPOINT data.manifest=MANIFEST [SETTING=VALUE ...]
       vdtrain evaluate images=FOLDER [prompts=FILE] data.manifest=MANIFEST [SETTING=VALUE ...]
       vdtrain evaluate captions=FILE data.manifest=MANIFEST [SETTING=VALUE ...]

Measure flows on pairs that the model has not seen: FID, KID, precision, recall and the CLIP score for images; the CLIP
score, BLEU, CIDEr-D and distinct-n for captions. Images and captions that another program made are measured by the same
code, also against a folder of real images (real_images=FOLDER). gpus=N shares the samples among N processes, one on
each GPU, as srun and torchrun do. Run the same command again after an interruption: it continues. With more samples=,
flows= or guidance_scales= it adds to the results. docs/evaluation.md explains the figures.

Exit status: 0 done, 75 stopped by SIGTERM or SIGUSR1, 130 stopped by Ctrl-C, 1 an error, 2 a mistake in the settings.

Examples:
  vdtrain evaluate runs/stage3_four_flow data.manifest=data/coco/manifest fid.weights=weights/inception.pth
  vdtrain evaluate weights/versatile_diffusion data.manifest=data/coco/manifest 'flows=[image-to-text]'
  vdtrain evaluate images=rival prompts=rival.csv data.manifest=data/coco/manifest output_dir=evaluation/rival
  vdtrain evaluate demo/runs-long/stage3_four_flow data=shapes resolution=64 steps=25 guidance_scale=3 samples=200
"""


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain evaluate`; returns its exit status."""

    def action(config: EvaluateConfig, raw_config: DictConfig, launch: dict[str, str]) -> int:
        # Heavy imports come last, so that a mistake on the command line is reported at once.
        from vdtrain.evaluation.processes import run

        return run(config, launch)

    plain = PlainArguments(("checkpoint",))
    return run_command_on_ranks(USAGE, "evaluate", EvaluateConfig, action, arguments, plain)
