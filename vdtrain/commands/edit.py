"""Edit images by words, in the latent of the text that describes each image.

vdtrain edit runs/stage3_four_flow image.png remove='a circle' add='a star, red'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from vdtrain.commands.sample import PLAIN_INPUTS
from vdtrain.config.command import run_command
from vdtrain.config.schema import EditConfig
from vdtrain.errors import ConfigError

USAGE = """\
Usage: vdtrain edit CHECKPOINT IMAGE ... remove=WORDS add=WORDS [SETTING=VALUE ...]

Latent image-to-text-to-image editing: each image becomes a text latent, words are removed from it and added to it, and
the result is drawn in the style of the image. The captions of the changed latents are printed.

Examples:
  vdtrain edit runs/stage3_four_flow image.png remove='a circle' add='a star, red'
"""


def edit(config: EditConfig, raw_config: DictConfig) -> int:
    """Edit and write the results; returns the exit status."""
    if not config.inputs:
        raise ConfigError("inputs: empty; give at least one image file")
    from vdtrain.commands.sampler import Sampler
    from vdtrain.diffusion.editing import IMAGE
    from vdtrain.diffusion.editing import edit as edit_images

    sampler = Sampler(config, raw_config)
    images, captions = edit_images(
        sampler.model,
        sampler.read(IMAGE, config.inputs),
        config.remove,
        config.add,
        text_share=config.text_share,
        style_rank=config.style_rank,
        progress=sampler.progress,
        **sampler.settings,
    )
    print("\n".join(captions))
    return sampler.write(IMAGE, images)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vdtrain edit`."""
    return run_command(USAGE, "edit", EditConfig, edit, sys.argv[1:] if argv is None else argv, plain=PLAIN_INPUTS)
