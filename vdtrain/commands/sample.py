"""Make images and captions with a trained model.

vdtrain sample runs/stage3_four_flow "a red circle, on white" "a blue star" output_dir=samples
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.command_line import PlainArguments
from vdtrain.config.schema import SampleConfig
from vdtrain.errors import ConfigError

USAGE = """\
Usage: vdtrain sample CHECKPOINT INPUT ... [SETTING=VALUE ...]

Make samples from inputs. INPUT is a caption or an image file, by the context of flow=FLOW: text-to-image (default),
image-to-image, image-to-text or text-to-text. Captions are used unchanged. Put an input that looks like a setting last,
after --. CHECKPOINT and the inputs can be settings too: checkpoint=RUN 'inputs=a red circle', or for several inputs
'inputs=["a red circle, on white", "a blue star"]'.

Examples:
  vdtrain sample runs/stage3_four_flow "a red circle, on white" "a blue star" output_dir=samples
  vdtrain sample runs/stage3_four_flow image.png flow=image-to-text output_dir=captions
  vdtrain sample runs/stage3_four_flow image.png flow=image-to-image focus=0.1
  vdtrain sample runs/stage3_four_flow "a blue star" start_from=image.png fidelity=0.4
  vdtrain sample runs/stage3_four_flow -- "seed=3, says the sign" "-5 degrees"
"""

# Of sample and edit.
PLAIN_INPUTS = PlainArguments(("checkpoint",), rest="inputs")


def sample(config: SampleConfig, raw_config: DictConfig) -> int:
    """Sample and write the results; returns the exit status."""
    if not config.inputs:
        raise ConfigError("inputs: empty; give at least one caption or image file")
    if config.start_from and len(config.start_from) != len(config.inputs):
        raise ConfigError(
            f"start_from: {len(config.start_from)} for {len(config.inputs)} inputs; give one for each, or none"
        )
    from vdtrain.commands.sampler import Sampler

    sampler = Sampler(config, raw_config)
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
