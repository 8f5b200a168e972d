"""Make images and captions with a trained model.

vdtrain sample runs/stage3_four_flow "a red circle, on white" "a blue star" output_dir=samples
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from vdtrain.config.command_line import PlainArguments
from vdtrain.config.compose import ConfigError, run_command
from vdtrain.config.schema import SampleConfig

SAMPLER_SETTINGS = """\
  checkpoint          run folder (its latest checkpoint), checkpoint folder, or weights folder
  weights             ema (averaged) or model (as trained)
  output_dir          where 0000.png ... or captions.txt go; images keep the settings in their metadata
  resolution          side of the images in pixels; height=, width= for images that are not square
  solver, steps       ddim (50 steps), or dpm-solver++ or unipc (about 20)
  guidance_scale, eta, seed, batch_size, device, precision (fp32, bf16, fp16), threads
"""

USAGE = f"""\
Usage: vdtrain sample CHECKPOINT INPUT ... [SETTING=VALUE ...]

Make samples from inputs. INPUT is a caption or an image file, by the context of flow=FLOW: text-to-image (default),
image-to-image, image-to-text or text-to-text. Captions are kept to the letter. An input that looks like a setting comes
last, after --. CHECKPOINT and INPUTs may be settings too: checkpoint=RUN 'inputs=a red circle' or, several,
'inputs=["a red circle, on white", "a blue star"]'.

  --help              this text
  --cfg job           print the configuration and stop

Examples:
  vdtrain sample runs/stage3_four_flow "a red circle, on white" "a blue star" output_dir=samples
  vdtrain sample runs/stage3_four_flow image.png flow=image-to-text output_dir=captions
  vdtrain sample runs/stage3_four_flow image.png flow=image-to-image focus=0.1
  vdtrain sample runs/stage3_four_flow "a blue star" start_from=image.png fidelity=0.4
  vdtrain sample runs/stage3_four_flow -- "seed=3, says the sign" "-5 degrees"

Settings:
  focus               image contexts: 0 keeps the content, 0.5 changes nothing, 1 keeps the style
  start_from          samples to begin from instead of from noise, one for each input
  fidelity            how little they are noised: 0 (from noise) to 1 (start_from itself)
  samples_per_input
{SAMPLER_SETTINGS}"""

# Of each command that reads inputs with a model.
PLAIN_INPUTS = PlainArguments(("checkpoint",), rest="inputs")


def sample(config: SampleConfig, document: DictConfig) -> int:
    """Sample and write the results; returns the exit status."""
    if not config.inputs:
        raise ConfigError("inputs: empty; give at least one caption or image file")
    if config.samples_per_input < 1:
        raise ConfigError(f"samples_per_input={config.samples_per_input}: must be at least 1")
    if config.start_from and len(config.start_from) != len(config.inputs):
        raise ConfigError(
            f"start_from: {len(config.start_from)} for {len(config.inputs)} inputs; give one for each, or none"
        )
    from vdtrain.commands.sampler import Sampler

    sampler = Sampler(config, document)
    flow = sampler.model.flow(config.flow)
    start = _repeated(config.start_from, config.samples_per_input)
    samples = sampler.model.generate(
        config.flow,
        sampler.read(flow.context, _repeated(config.inputs, config.samples_per_input)),
        focus=config.focus,
        start_from=sampler.read(flow.output, start, sampler.size) if start else None,
        fidelity=config.fidelity,
        progress=sampler.progress,
        **sampler.settings,
    )
    return sampler.write(flow.output, samples)


def _repeated(inputs: Sequence[str], times: int) -> list[str]:
    return [given for given in inputs for _ in range(times)]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vdtrain sample`."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(USAGE, "sample", SampleConfig, sample, arguments, plain=PLAIN_INPUTS)
