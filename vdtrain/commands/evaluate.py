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

Measure flows on pairs that the model has not seen: for images FID, the same distance on CLIP's features and the CLIP
score, for captions the CLIP score. Processes share the samples. The same command goes on after an interruption, and
with more samples= or flows= it adds to what is there. docs/evaluation.md says what the figures are.

Exit status: 0 done, 75 stopped by SIGTERM or SIGUSR1, 1 an error, 2 a mistake in the settings, 130 by Ctrl-C.

  --help              this text
  --cfg job           print the configuration and stop

Examples:
  vdtrain evaluate runs/stage3_four_flow data.manifest=data/coco/manifest fid.weights=weights/inception.pth
  vdtrain evaluate weights/versatile_diffusion data.manifest=data/coco/manifest 'flows=[image-to-text]'
  vdtrain evaluate demo/runs-long/stage3_four_flow data=shapes resolution=64 steps=25 guidance_scale=3 samples=200

Settings:
  checkpoint          the same as CHECKPOINT: run folder (its latest checkpoint), checkpoint folder, or weights folder
  weights             ema (averaged) or model (as trained)
  data.manifest       the pairs: samples= of them, chosen by seed=, each for all flows
  flows, samples      which flows, and how many samples of each
  output_dir          where metrics.json, a contact sheet for every flow and what was made so far go
  fid.weights         Inception's weights of 2015 (docs/evaluation.md says where they are); null leaves FID out
  fid.reference       mean and covariance of the real images, read where the file is, else written there
  clip.architecture, clip.weights, clip.tokenizer   the CLIP that scores; null is that of the model's contexts
  resolution, steps, guidance_scale, solver, eta, seed, batch_size, device, precision (fp32, bf16, fp16), threads
  part_samples        samples that an interruption costs at most, for each process and flow
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vdtrain evaluate`."""

    def action(config: EvaluateConfig, document: DictConfig, launch: dict[str, str]) -> int:
        # Heavy imports come last, so that a mistake of the command line is said at once.
        from vdtrain.evaluation.processes import run

        return run(config, launch)

    arguments = sys.argv[1:] if argv is None else argv
    plain = PlainArguments(("checkpoint",))
    return run_command_on_ranks(USAGE, "evaluate", EvaluateConfig, action, arguments, plain)
