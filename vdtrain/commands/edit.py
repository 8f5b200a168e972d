"""Edit images by words, in the latent of the text that describes them.

vdtrain edit runs/stage3_four_flow image.png remove='a circle' add='a star, red'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from vdtrain.commands.sample import PLAIN_INPUTS, SAMPLER_SETTINGS
from vdtrain.config.compose import ConfigError, run_command
from vdtrain.config.schema import EditConfig

USAGE = f"""\
Usage: vdtrain edit CHECKPOINT IMAGE ... remove=WORDS add=WORDS [SETTING=VALUE ...]

Latent image-to-text-to-image editing: each image is read as a text latent, words are taken out of it and put in, and
the result is drawn in the style of the image. The captions that the changed latents read as are printed.

  --help              this text
  --cfg job           print the configuration and stop

Examples:
  vdtrain edit runs/stage3_four_flow image.png remove='a circle' add='a star, red'

Settings:
  remove, add         what to take out and what to put in; either may be empty
  text_share          of the text in the new image; the old one's style has the rest
  style_rank          components of the old image's context that count as its style
{SAMPLER_SETTINGS}"""


def edit(config: EditConfig, document: DictConfig) -> int:
    """Edit and write the results; returns the exit status."""
    if not config.inputs:
        raise ConfigError("inputs: empty; give at least one image file")
    from vdtrain.commands.sampler import Sampler
    from vdtrain.diffusion.editing import IMAGE
    from vdtrain.diffusion.editing import edit as edit_images

    sampler = Sampler(config, document)
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
