"""Make samples from several captions and images at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.command_line import PlainArguments
from vdtrain.config.command_schema import BlendConfig
from vdtrain.errors import ConfigError

if TYPE_CHECKING:
    from vdtrain.inference.sampler import Sampler
    from vdtrain.pipeline import ContextInput

USAGE = """\
Usage: vdtrain blend CHECKPOINT MODALITY:INPUT ... [SETTING=VALUE ...]
       vdtrain blend CHECKPOINT 'contexts=[{text: "...", weight: 0.4}, {image: FILE}, ...]' [...]

Make samples from any number of captions and images: the dual-context and the multi-context blender. In contexts=, each
context may have a weight; only their ratios matter. An image may have a mask, an image file: white keeps, black hides.
It may have a focus too: 0 keeps its content, 0.5 changes nothing, 1 keeps its style.

Examples:
  vdtrain blend runs/stage3_four_flow "text:a red circle, on white" image:star.png
  vdtrain blend runs/stage3_four_flow output=text "text:a red circle" image:star.png
  vdtrain blend runs/stage3_four_flow 'contexts=[{text: "a red circle", weight: 2}, {image: star.png, weight: 3}]'
  vdtrain blend runs/stage3_four_flow 'contexts=[{image: a.png, mask: left.png}, {text: "green"}]' samples=4
  vdtrain blend runs/stage3_four_flow 'contexts=[{image: a.png, focus: 0}, {image: b.png, focus: 1}]'
"""


def _context(word: str) -> dict[str, str]:
    modality, colon, given = word.partition(":")
    if not colon or not modality.isidentifier():
        raise ConfigError(f"{word}: not of the form MODALITY:INPUT; write text:{word} or image:{word}")
    return {modality: given}


PLAIN_CONTEXTS = PlainArguments(("checkpoint",), rest="contexts", item=_context)


def blend(config: BlendConfig, raw_config: DictConfig, made: Callable[..., Sampler] | None = None) -> int:
    """Sample and write the results; returns the exit status. `made` makes the sampler from the two configurations."""
    if not config.contexts:
        raise ConfigError("contexts: empty; give at least one caption or image, e.g. 'text:a red circle'")
    from vdtrain.diffusion.contexts import normalised
    from vdtrain.inference.sampler import Sampler
    from vdtrain.media import BYTES

    sampler = (made or Sampler)(config, raw_config)
    contexts = [_context_input(sampler, config.output, index, given) for index, given in enumerate(config.contexts)]
    normalised([each.weight for each in contexts])
    what = f"{' + '.join(each.modality for each in contexts)} to {config.output}"
    samples = sampler.load(config.output, what).blend(
        config.output,
        contexts,
        count=config.samples,
        mixing=config.mixing,
        join=config.join,
        progress=sampler.progress,
        output_type=BYTES,
        **sampler.settings,
    )
    return sampler.write(config.output, samples)


def _context_input(sampler: Sampler, output: str, index: int, given: Mapping[str, Any]) -> ContextInput:
    from vdtrain.config.instantiate import find_target
    from vdtrain.diffusion.contexts import check_focus
    from vdtrain.media import read_mask
    from vdtrain.pipeline import ContextInput

    setting = f"contexts.{index}"
    modalities = [key for key in given if key not in ("weight", "mask", "focus")]
    if len(modalities) != 1:
        raise ConfigError(f"{setting}={dict(given)}: give one modality with its input, e.g. {{text: a red circle}}")
    weight, focus, mask = given.get("weight", 1.0), given.get("focus", 0.5), given.get("mask")
    for name, number in (("weight", weight), ("focus", focus)):
        if not isinstance(number, int | float):
            raise ConfigError(f"{setting}.{name}={number}: not a number")
    check_focus(focus)
    modality, sample = modalities[0], str(given[modalities[0]])
    sampler.checkpoint.flow(f"{modality}-to-{output}", "contexts to output")
    if mask is not None:
        encoder = sampler.checkpoint.model.modalities[modality].context_encoder
        if not hasattr(find_target(encoder, "context_encoder")[0], "encode_masked"):
            raise ConfigError(f"{setting}.mask={mask}: contexts of modality {modality!r} take no mask; leave it out")
    sampler.check_captions(modality, [sample], f"{setting}.{modality}", f"image:{sample}")
    batch = sampler.read(modality, [sample])
    return ContextInput(modality, batch[0], float(weight), None if mask is None else read_mask(str(mask)), focus)


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain blend`; returns its exit status."""
    return run_command(USAGE, "blend", BlendConfig, blend, arguments, plain=PLAIN_CONTEXTS)
