"""Edit images by words, in the latent of the text that describes each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from vdtrain.commands.sample import PLAIN_INPUTS
from vdtrain.config.command import run_command
from vdtrain.config.command_schema import EditConfig
from vdtrain.errors import ConfigError

if TYPE_CHECKING:
    from vdtrain.inference.sampler import Sampler

USAGE = """\
Usage: vdtrain edit CHECKPOINT IMAGE ... remove=WORDS add=WORDS [SETTING=VALUE ...]

Latent image-to-text-to-image editing: each image becomes a text latent, words are removed from it and added to it, and
the result is drawn in the style of the image. The captions of the changed latents are printed.

Examples:
  vdtrain edit runs/stage3_four_flow image.png remove='a circle' add='a star, red'
"""


def edit(config: EditConfig, raw_config: DictConfig, made: Callable[..., Sampler] | None = None) -> int:
    """Edit and write the results; returns the exit status. `made` makes the sampler from the two configurations."""
    if not config.inputs:
        raise ConfigError("inputs: empty; give at least one image file")
    if not config.remove and not config.add:
        raise ConfigError("remove, add: both are empty; give at least one")
    if not 0 < config.text_share < 1:
        raise ConfigError(f"text_share={config.text_share}: must be between 0 and 1")
    from vdtrain.diffusion.editing import FLOWS, IMAGE, TEXT
    from vdtrain.inference.sampler import Sampler
    from vdtrain.media import BYTES

    sampler = (made or Sampler)(config, raw_config)
    for name in FLOWS:
        sampler.checkpoint.flow(name)
    for setting in ("remove", "add"):
        sampler.check_captions(TEXT, [getattr(config, setting)], setting)
    images = sampler.read(IMAGE, config.inputs)
    images, captions = sampler.load(IMAGE, "editing").edit(
        images,
        config.remove,
        config.add,
        text_share=config.text_share,
        style_rank=config.style_rank,
        progress=sampler.progress,
        output_type=BYTES,
        **sampler.settings,
    )
    sampler.say(captions)
    return sampler.write(IMAGE, images)


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain edit`; returns its exit status."""
    return run_command(USAGE, "edit", EditConfig, edit, arguments, plain=PLAIN_INPUTS)
