"""Make samples from several captions and images at once.

vdtrain blend runs/stage3_four_flow "text:a red circle" image:star.png
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.command_line import PlainArguments
from vdtrain.config.schema import BlendConfig
from vdtrain.errors import ConfigError

if TYPE_CHECKING:
    from vdtrain.commands.sampler import Sampler
    from vdtrain.pipeline import ContextInput

USAGE = """\
Usage: vdtrain blend CHECKPOINT MODALITY:INPUT ... [SETTING=VALUE ...]
       vdtrain blend CHECKPOINT 'contexts=[{text: "...", weight: 0.4}, {image: FILE}, ...]' [...]

Make samples from any number of captions and images: the dual-context and the multi-context blender. In contexts=, each
context may have a weight; only their ratios matter. An image may have a mask, an image file: white keeps, black hides.

Examples:
  vdtrain blend runs/stage3_four_flow "text:a red circle, on white" image:star.png
  vdtrain blend runs/stage3_four_flow output=text "text:a red circle" image:star.png
  vdtrain blend runs/stage3_four_flow 'contexts=[{text: "a red circle", weight: 2}, {image: star.png, weight: 3}]'
  vdtrain blend runs/stage3_four_flow 'contexts=[{image: a.png, mask: left.png}, {text: "green"}]' samples=4
"""


def _context(word: str) -> dict[str, str]:
    modality, colon, given = word.partition(":")
    if not colon or not modality.isidentifier():
        raise ConfigError(f"{word}: not of the form MODALITY:INPUT; write text:{word} or image:{word}")
    return {modality: given}


PLAIN_CONTEXTS = PlainArguments(("checkpoint",), rest="contexts", item=_context)


def blend(config: BlendConfig, raw_config: DictConfig) -> int:
    """Sample and write the results; returns the exit status."""
    from vdtrain.commands.sampler import Sampler

    sampler = Sampler(config, raw_config)
    samples = sampler.model.blend(
        config.output,
        [_context_input(sampler, f"contexts.{index}", given) for index, given in enumerate(config.contexts)],
        count=config.samples,
        mixing=config.mixing,
        join=config.join,
        progress=sampler.progress,
        **sampler.settings,
    )
    return sampler.write(config.output, samples)


def _context_input(sampler: Sampler, setting: str, given: Mapping[str, Any]) -> ContextInput:
    from vdtrain.media import read_mask
    from vdtrain.pipeline import ContextInput

    modalities = [key for key in given if key not in ("weight", "mask")]
    if len(modalities) != 1:
        raise ConfigError(f"{setting}={dict(given)}: give one modality with its input, e.g. {{text: a red circle}}")
    weight, mask = given.get("weight", 1.0), given.get("mask")
    if not isinstance(weight, int | float):
        raise ConfigError(f"{setting}.weight={weight}: not a number")
    batch = sampler.read(modalities[0], [str(given[modalities[0]])])
    return ContextInput(modalities[0], batch[0], float(weight), None if mask is None else read_mask(str(mask)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vdtrain blend`."""
    return run_command(USAGE, "blend", BlendConfig, blend, sys.argv[1:] if argv is None else argv, plain=PLAIN_CONTEXTS)
