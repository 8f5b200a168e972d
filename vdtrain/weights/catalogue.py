"""Names: what `vdtrain weights` imports from and exports to. Light, so that help and mistakes need no libraries."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from vdtrain.config.command_line import plain_path, shell
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights.layouts import contents, recognised
from vdtrain.weights.tensor_files import SUFFIXES, choose, open_tensors

RELEASED = "hf:shi-labs/versatile-diffusion{}@2926f8e11ea526b562cd592b099fcf9c2985d0b7"


@dataclass(frozen=True)
class Source:
    """A kind of published weights.

    Attributes:
        text: what it is, in a line of help.
        address: where it is taken from if no path is given; None if no such place is known.
        parts: what is needed of a folder of a repository; none for all weights in it.
        output: where its diffuser goes if no output is given; None for frozen parts.
    """

    text: str
    address: str | None = None
    parts: tuple[str, ...] = ()
    output: str | None = None


SOURCES = {
    "versatile_diffusion": Source(
        "Versatile Diffusion: vd-four-flow-v1-0.pth of 2023, or vd-official.pth of 2022 with its frozen parts",
        RELEASED.format("/pretrained_pth/vd-four-flow-v1-0.pth"),
        output="weights/versatile_diffusion",
    ),
    "diffusers": Source(
        "Versatile Diffusion as a folder of diffusers; its diffuser alone",
        RELEASED.format(""),
        ("image_unet", "text_unet", "scheduler"),
        "weights/versatile_diffusion",
    ),
    "safetensors": Source(
        "a weights folder that `vdtrain weights export safetensors` wrote", output="weights/versatile_diffusion"
    ),
    "stable_diffusion": Source(
        "Stable Diffusion v1 as the start of stage 1: sd-v1-4.ckpt, or a folder of diffusers",
        "hf:CompVis/stable-diffusion-v1-4@133a221b8aa7292a167afc5127cb63fb5005638b",
        ("unet", "scheduler"),
        "weights/stable_diffusion_v1",
    ),
    "image_vae": Source(
        "the image VAE: kl-f8.pth, Stable Diffusion's file, or a vae folder of diffusers",
        RELEASED.format("/pretrained_pth/kl-f8.pth"),
    ),
    "text_vae": Source("the text VAE Optimus: optimus-vae.pth", RELEASED.format("/pretrained_pth/optimus-vae.pth")),
    "clip": Source(
        "CLIP ViT-L/14, by Hugging Face or by open_clip",
        "hf:openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41",
    ),
    "bert_tokenizer": Source(
        "BERT-base-cased's tokenizer: tokenizer.json or vocab.txt",
        "hf:google-bert/bert-base-cased@cd5ef92a9fb2f889e972770a36d4ed042daf221e",
        ("tokenizer.json", "vocab.txt"),
    ),
    "gpt2_tokenizer": Source(
        "GPT-2's tokenizer: tokenizer.json, or vocab.json and merges.txt",
        "hf:openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
        ("tokenizer.json", "vocab.json", "merges.txt"),
    ),
}

FORMATS = {
    "versatile_diffusion": "one .pth in the layout of the released vd-four-flow-v1-0",
    "safetensors": "a weights folder: the same keys as safetensors, with the model's configuration",
    "diffusers": "a folder of diffusers' Versatile Diffusion pipelines, frozen parts included",
}

DEFAULT_MODEL = "versatile_diffusion"


def is_published(path: Path) -> bool:
    """Whether a path is, or by its name would be, weights as others publish them."""
    if not path.is_dir():
        return path.is_file() or path.suffix in SUFFIXES
    return pipeline_source(path) is not None or choose(file.name for file in path.iterdir()) is not None


def import_first(setting: str, value: str, model: str | None = None) -> WeightsError:
    """The error of a setting that names published weights.

    Args:
        model: that the weights are wanted for, by name; None for the one of full size.

    Raises:
        WeightsError: they cannot be read at all.
    """
    path = Path(value).expanduser()
    what = f"{setting}={value}"
    if not path.exists():
        return WeightsError(
            f"{what}: no such file; one of published weights is imported first, by `vdtrain weights import "
            "stable_diffusion FILE` or `vdtrain weights import versatile_diffusion FILE`"
        )
    source, text = pipeline_source(path) if path.is_dir() else None, "a pipeline of diffusers"
    if source is None:
        keys = list(open_tensors(path, setting))
        layouts = recognised(keys)
        layout = next((each for each in layouts if SOURCES[each.source].output), None)
        if layout is None:
            return WeightsError(f"{what}: holds {contents(keys)}, and no diffuser; give weights of one")
        source, text = layout.source, layout.text
    output = _free(source, path)
    words = ["vdtrain", "weights", "import", source, plain_path(value)]
    words += [f"model={model}"] if model not in (None, DEFAULT_MODEL) else []
    words += [f"output={output}"] if str(output) != SOURCES[source].output else []
    return WeightsError(f"{what}: holds {text}, which is imported once: `{shell(words)}`; then give {setting}={output}")


def pipeline_source(folder: Path) -> str | None:
    """The source that reads a folder of one of diffusers' pipelines; None for any other path."""
    if (folder / "image_unet").is_dir() and (folder / "text_unet").is_dir():
        return "diffusers"
    return "stable_diffusion" if (folder / "unet").is_dir() else None


def import_of(folder: Path) -> str:
    """The command that makes a weights folder which is not there."""
    source = next((name for name, each in SOURCES.items() if each.output == str(folder)), None)
    return "vdtrain weights import" + (f" {source}" if source else "")


def _free(source: str, path: Path) -> Path:
    """Where the import can go without replacing anything."""
    stem = path.name if path.is_dir() else path.stem
    plain = "".join(each if each.isalnum() or each in "-_." else "_" for each in stem).strip(".") or source
    numbered = (Path(f"weights/{plain}-{number}") for number in count(2))
    places = chain([Path(SOURCES[source].output or plain), Path("weights", plain)], numbered)
    return next(place for place in places if not place.exists())
