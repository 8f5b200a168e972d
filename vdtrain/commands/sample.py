"""Make images and captions with a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.command_line import PlainArguments
from vdtrain.config.command_schema import SampleConfig
from vdtrain.errors import ConfigError

if TYPE_CHECKING:
    from vdtrain.inference.sampler import Sampler

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


def sample(config: SampleConfig, raw_config: DictConfig, made: Callable[..., Sampler] | None = None) -> int:
    """Sample and write the results; returns the exit status. `made` makes the sampler from the two configurations."""
    if not config.inputs:
        raise ConfigError("inputs: empty; give at least one caption or image file")
    if config.start_from and len(config.start_from) != len(config.inputs):
        raise ConfigError(
            f"start_from: {len(config.start_from)} for {len(config.inputs)} inputs; give one for each, or none"
        )
    if not 0 <= config.fidelity <= 1:
        raise ConfigError(f"fidelity={config.fidelity}: must be from 0 (noise) to 1 (start_from itself)")
    if config.fidelity > 0 and not config.start_from:
        raise ConfigError(f"start_from: empty; fidelity={config.fidelity} needs one for each input")
    from vdtrain.diffusion.contexts import check_focus
    from vdtrain.inference.sampler import Sampler
    from vdtrain.media import BYTES

    sampler = (made or Sampler)(config, raw_config)
    check_focus(config.focus)
    flow = sampler.flow(config.flow, config.inputs)
    inputs = sampler.read(flow.context, config.inputs)
    sampler.check_captions(flow.output, config.start_from, "start_from")
    begun = sampler.read(flow.output, config.start_from, sampler.size) if config.start_from else None
    samples = sampler.load(flow.output, flow.name).generate(
        flow.name,
        inputs,
        samples_per_input=config.samples_per_input,
        focus=config.focus,
        start_from=begun,
        fidelity=config.fidelity,
        progress=sampler.progress,
        output_type=BYTES,
        **sampler.settings,
    )
    return sampler.write(flow.output, samples)


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain sample`; returns its exit status."""
    return run_command(USAGE, "sample", SampleConfig, sample, arguments, plain=PLAIN_INPUTS)
