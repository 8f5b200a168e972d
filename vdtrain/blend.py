"""Make samples from several captions and pictures at once.

vdtrain blend checkpoint=runs/stage3_four_flow 'contexts=[{text:"a red circle",weight:0.4},{image:star.png,weight:0.6}]'
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vdtrain.compose import ConfigError, run_verb
from vdtrain.config import BlendConfig
from vdtrain.sample import SAMPLER_SETTINGS

if TYPE_CHECKING:
    from vdtrain.pipeline import Ingredient
    from vdtrain.sampler import Sampler

USAGE = f"""\
Usage: vdtrain blend checkpoint=RUN output=MODALITY 'contexts=[{{text: "..."}}, {{image: FILE}}, ...]' [...]

Make samples from any number of captions and pictures: the dual-context and the multi-context blender. A context may
have a weight (only the ratios matter), and a picture a mask, a picture file of which white keeps and black hides.

  --help              this text
  --cfg job           print the configuration and stop

Examples:
  vdtrain blend 'contexts=[{{text: "a red circle", weight: 0.4}}, {{image: star.png, weight: 0.6}}]'
  vdtrain blend 'contexts=[{{image: a.png, mask: left.png}}, {{image: b.png}}, {{text: "green"}}]' samples=4
  vdtrain blend output=text 'contexts=[{{text: "a red circle"}}, {{image: star.png}}]'

Settings:
  output              image or text
  samples             how many
  mixing              attention averages the contexts in every context layer; layer draws one of them for each
  join                contexts of one modality become one, token after token (true), or are mixed one by one (false)
{SAMPLER_SETTINGS}"""


def blend(config: BlendConfig, document: DictConfig) -> int:
    """Sample and write the results; returns the exit status."""
    from vdtrain.sampler import Sampler

    sampler = Sampler(config, document)
    samples = sampler.model.blend(
        config.output,
        [_ingredient(sampler, f"contexts.{index}", given) for index, given in enumerate(config.contexts)],
        count=config.samples,
        mixing=config.mixing,
        join=config.join,
        progress=sampler.progress,
        **sampler.settings,
    )
    return sampler.write(config.output, samples)


def _ingredient(sampler: Sampler, setting: str, given: Mapping[str, Any]) -> Ingredient:
    from vdtrain.media import read_mask
    from vdtrain.pipeline import Ingredient

    modalities = [key for key in given if key not in ("weight", "mask")]
    if len(modalities) != 1:
        raise ConfigError(f"{setting}={dict(given)}: give one modality with its input, e.g. {{text: a red circle}}")
    weight, mask = given.get("weight", 1.0), given.get("mask")
    if not isinstance(weight, int | float):
        raise ConfigError(f"{setting}.weight={weight}: not a number")
    batch = sampler.read(modalities[0], [str(given[modalities[0]])])
    return Ingredient(modalities[0], batch[0], float(weight), None if mask is None else read_mask(str(mask)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vdtrain blend`."""
    return run_verb(USAGE, "blend", BlendConfig, blend, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
