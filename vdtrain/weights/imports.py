"""What `vdtrain weights import` reads: one function for each source.

A function reads and checks everything, and returns what will be written; it writes nothing. PyTorch is imported inside
the functions, so that help and errors of the command line are fast.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vdtrain.config.command_schema import WeightsConfig
from vdtrain.config.schema import ModelConfig
from vdtrain.errors import ConfigError
from vdtrain.files import refuse_existing

if TYPE_CHECKING:
    from vdtrain.weights.tensor_files import LazyTensors

RELEASED = "hf:shi-labs/versatile-diffusion{}@2926f8e11ea526b562cd592b099fcf9c2985d0b7"
# Where a source is downloaded from if no path is given.
ADDRESSES = {
    "versatile_diffusion": RELEASED.format("/pretrained_pth/vd-four-flow-v1-0.pth"),
    "diffusers": RELEASED.format(""),
    "stable_diffusion": "hf:CompVis/stable-diffusion-v1-4@133a221b8aa7292a167afc5127cb63fb5005638b",
    "image_vae": RELEASED.format("/pretrained_pth/kl-f8.pth"),
    "text_vae": RELEASED.format("/pretrained_pth/optimus-vae.pth"),
    "clip": "hf:openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41",
    "bert_tokenizer": "hf:google-bert/bert-base-cased@cd5ef92a9fb2f889e972770a36d4ed042daf221e",
    "gpt2_tokenizer": "hf:openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
}
# Where a source's diffuser goes if no output is given. The other sources are frozen parts.
FOLDERS = {
    "versatile_diffusion": "weights/versatile_diffusion",
    "diffusers": "weights/versatile_diffusion",
    "safetensors": "weights/versatile_diffusion",
    "stable_diffusion": "weights/stable_diffusion_v1",
}
DEFAULT_MODEL = "versatile_diffusion"
OUTPUT, PATH = "output", "path"


@dataclass(frozen=True)
class Output:
    """A file or folder that an import will write. Its content is checked.

    Attributes:
        summary: what it holds, for people.
        write: writes it.
    """

    path: Path
    summary: str
    write: Callable[[], None]


def versatile_diffusion(path: str, config: WeightsConfig) -> list[Output]:
    """Versatile Diffusion: vd-four-flow-v1-0.pth of 2023, or vd-official.pth of 2022 with its frozen parts."""
    from vdtrain.weights.frozen_parts import outputs_of
    from vdtrain.weights.published.versatile_diffusion import open_release

    local = _fetched("versatile_diffusion", path, config)
    diffuser, frozen = open_release(local, config.model, PATH)
    return [_weights_folder(diffuser, config), *outputs_of(frozen, local, config)]


def diffusers(path: str, config: WeightsConfig) -> list[Output]:
    """Versatile Diffusion as a diffusers folder; its diffuser only."""
    from vdtrain.weights.published.diffusers_names import open_pipeline

    local = _fetched("diffusers", path, config, ("image_unet", "text_unet", "scheduler"))
    return [_weights_folder(open_pipeline(local, config.model, PATH), config)]


def safetensors(path: str, config: WeightsConfig) -> list[Output]:
    """A weights folder that `vdtrain weights export safetensors` wrote."""
    from vdtrain.weights.folder import open_checked

    local = _fetched("safetensors", path, config)
    return [_weights_folder(open_checked(local, config.model, PATH), config)]


def stable_diffusion(path: str, config: WeightsConfig) -> list[Output]:
    """Stable Diffusion v1 as the start of stage 1: sd-v1-4.ckpt, or a diffusers folder."""
    from vdtrain.weights.published.stable_diffusion import open_stable_diffusion

    local = _fetched("stable_diffusion", path, config, ("unet", "scheduler"))
    return [_weights_folder(open_stable_diffusion(local, config.model, list(config.model.modalities), PATH), config)]


def _frozen_part(name: str, text: str) -> Source:
    """The source of a frozen part's weights or of a tokenizer, with its help text."""

    def read(path: str, config: WeightsConfig) -> list[Output]:
        from vdtrain.weights.frozen_parts import PARTS, TOKENIZERS, part_outputs, tokenizer_outputs

        (part,) = [each for each in PARTS if each.source == name]
        return (tokenizer_outputs if part in TOKENIZERS else part_outputs)(part, path, config)

    read.__doc__ = text
    return read


Source = Callable[[str, WeightsConfig], list[Output]]
"""(path or address, settings) -> what will be written. For a diffuser, `output` is set. The first line of the docstring
is the help text. Raises a ConfigError if the weights cannot be read or are of another model, or the output exists."""

FROZEN = {
    "image_vae": "The image VAE: kl-f8.pth, Stable Diffusion's file, or a diffusers vae folder.",
    "text_vae": "The text VAE Optimus: optimus-vae.pth.",
    "clip": "CLIP ViT-L/14, by Hugging Face or by open_clip.",
    "bert_tokenizer": "BERT-base-cased's tokenizer: tokenizer.json or vocab.txt.",
    "gpt2_tokenizer": "GPT-2's tokenizer: tokenizer.json, or vocab.json and merges.txt.",
}
SOURCES: dict[str, Source] = {
    **{source.__name__: source for source in (versatile_diffusion, diffusers, safetensors, stable_diffusion)},
    **{name: _frozen_part(name, text) for name, text in FROZEN.items()},
}


def source_of(file: str, model: ModelConfig) -> str | None:
    """The source whose import makes a file of the model's configuration; None if no import makes it."""
    from vdtrain.weights.frozen_parts import PARTS

    for part in PARTS:
        try:
            targets = part.targets(model)
        except (ConfigError, ImportError):
            continue
        if any(target.path == Path(file).expanduser() for target in targets):
            return part.source
    return None


def _fetched(source: str, path: str, config: WeightsConfig, needed: Collection[str] = ()) -> Path:
    """The local path of a published diffuser. Where the diffuser will go is checked first."""
    from vdtrain.weights.folder import is_export
    from vdtrain.weights.hub import fetched
    from vdtrain.weights.published.layouts import pipeline_source

    refuse_existing(Path(str(config.output)), f"{OUTPUT}={config.output}", config.overwrite, ours=is_export)
    local = fetched(path, needed)
    if (other := pipeline_source(local)) not in (None, source):
        raise ConfigError(
            f"{PATH}={path}: a diffusers pipeline for another source; `vdtrain weights import {other}` reads it"
        )
    return local


def _weights_folder(diffuser: LazyTensors, config: WeightsConfig) -> Output:
    from vdtrain.weights.folder import write_weights_folder

    folder = Path(str(config.output))
    write = partial(write_weights_folder, folder, diffuser, config.model, config.overwrite)
    return Output(folder, diffuser.summary, write)
