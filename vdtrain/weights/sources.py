"""What `vdtrain weights import` reads: every source by name, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from vdtrain.config import ModelConfig
from vdtrain.files import refuse_existing, write_text, written_whole
from vdtrain.weights import diffuser_sources, frozen_sources, tokenizer_files
from vdtrain.weights.diffuser_sources import Opened
from vdtrain.weights.folder import Tracked, write_weights_folder
from vdtrain.weights.frozen_sources import Convert, FrozenPart, Target
from vdtrain.weights.hub import fetched
from vdtrain.weights.tensor_files import LazyTensors, open_tensors

OUTPUT, PATH = "output", "path"


@dataclass(frozen=True)
class Product:
    """A file or folder that an import makes: checked, not yet written.

    Attributes:
        place: the setting that names it, and its value.
        summary: what it holds, for people.
    """

    path: Path
    place: str
    summary: str
    write: Callable[[bool, Tracked], None]


@dataclass(frozen=True)
class Request:
    """An import: of what model, where the diffuser goes, and whether what is there may be replaced."""

    model: ModelConfig
    output: Path
    overwrite: bool


@dataclass(frozen=True)
class Source:
    """A kind of published weights.

    Attributes:
        text: what it is, in a line of help.
        address: where it is taken from if no path is given; None if no such place is known.
        parts: what is needed of a folder of a repository; none for all weights in it.
        output: where its diffuser goes if no output is given; None for frozen parts.
        targets: the files of frozen parts that it makes, known before it is read.
        read: (local path, request) -> what comes of it.
    """

    text: str
    address: str | None
    parts: tuple[str, ...]
    output: str | None
    targets: Callable[[ModelConfig], list[Target]]
    read: Callable[[Path, Request], list[Product]]


def products(source: Source, path: str, request: Request) -> list[Product]:
    """Fetch and check what a source gives, without writing anything.

    Raises:
        ConfigError: the source cannot be read, is of another model, or something stands where it would go.
    """
    if source.output is not None:
        refuse_existing(request.output, f"{OUTPUT}={request.output}", request.overwrite)
    for target in source.targets(request.model):
        refuse_existing(target.path, target.place, request.overwrite)
    found = source.read(fetched(path, source.parts), request)
    for product in found:
        refuse_existing(product.path, product.place, request.overwrite)
    return found


def _no_targets(model: ModelConfig) -> list[Target]:
    return []


def _diffuser(
    text: str,
    address: str | None,
    parts: tuple[str, ...],
    output: str,
    read: Callable[[Path, ModelConfig], Opened],
) -> Source:
    def made(path: Path, request: Request) -> list[Product]:
        opened = read(path, request.model)
        place = f"{OUTPUT}={request.output}"

        def write(overwrite: bool, tracked: Tracked) -> None:
            write_weights_folder(request.output, opened.diffuser, request.model, OUTPUT, overwrite, tracked)

        frozen = [
            product
            for part, convert, tensors in opened.frozen
            for product in _part_files(part, convert, tensors, request.model, f"{PATH}={path}")
        ]
        return [Product(request.output, place, opened.diffuser.summary, write), *frozen]

    return Source(text, address, parts, output, _no_targets, made)


def _frozen(text: str, address: str | None, parts: tuple[str, ...], part: FrozenPart, convert: Convert) -> Source:
    def made(path: Path, request: Request) -> list[Product]:
        return _part_files(part, convert, open_tensors(path, PATH), request.model, f"{PATH}={path}")

    return Source(text, address, parts, None, part.targets, made)


def _tokenizer(
    text: str,
    address: str,
    parts: tuple[str, ...],
    part: FrozenPart,
    size: str,
    read: Callable[[Path, int, str], Tokenizer],
) -> Source:
    def made(path: Path, request: Request) -> list[Product]:
        found = []
        for target in part.targets(request.model):
            tokenizer = read(path, target.specification[size], f"{PATH}={path}")
            summary = f"{tokenizer.get_vocab_size():,} entries"
            found.append(Product(target.path, target.place, summary, partial(_write_tokenizer, target, tokenizer)))
        return found

    return Source(text, address, parts, None, part.targets, made)


def _part_files(
    part: FrozenPart, convert: Convert, tensors: LazyTensors, model: ModelConfig, place: str
) -> list[Product]:
    found = []
    for target in part.targets(model):
        state = convert(tensors, target.specification, place)
        summary = LazyTensors.of(state).summary
        found.append(Product(target.path, target.place, summary, partial(_write_part, target, state)))
    return found


def _write_part(target: Target, state: Mapping[str, Tensor], overwrite: bool, tracked: Tracked) -> None:
    with written_whole(target.path, target.place, overwrite) as draft:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, draft)


def _write_tokenizer(target: Target, tokenizer: Tokenizer, overwrite: bool, tracked: Tracked) -> None:
    with written_whole(target.path, target.place, overwrite) as draft:
        write_text(draft, tokenizer.to_str(pretty=True))


RELEASED = "hf:shi-labs/versatile-diffusion{}@2926f8e11ea526b562cd592b099fcf9c2985d0b7"

SOURCES = {
    "versatile_diffusion": _diffuser(
        "Versatile Diffusion: vd-four-flow-v1-0.pth of 2023, or vd-official.pth of 2022 with its frozen parts",
        RELEASED.format("/pretrained_pth/vd-four-flow-v1-0.pth"),
        (),
        "weights/versatile_diffusion",
        diffuser_sources.versatile_diffusion,
    ),
    "diffusers": _diffuser(
        "Versatile Diffusion as a folder of diffusers; its diffuser alone",
        RELEASED.format(""),
        ("image_unet", "text_unet"),
        "weights/versatile_diffusion",
        diffuser_sources.diffusers,
    ),
    "safetensors": _diffuser(
        "a weights folder that `vdtrain weights export safetensors` wrote",
        None,
        (),
        "weights/versatile_diffusion",
        diffuser_sources.safetensors,
    ),
    "stable_diffusion": _diffuser(
        "Stable Diffusion v1 as the start of stage 1: sd-v1-4.ckpt, or a folder of diffusers",
        "hf:CompVis/stable-diffusion-v1-4@133a221b8aa7292a167afc5127cb63fb5005638b",
        ("unet",),
        "weights/stable_diffusion_v1",
        diffuser_sources.stable_diffusion,
    ),
    "image_vae": _frozen(
        "the image VAE: kl-f8.pth, Stable Diffusion's file, or a vae folder of diffusers",
        RELEASED.format("/pretrained_pth/kl-f8.pth"),
        (),
        frozen_sources.IMAGE_VAE,
        frozen_sources.image_vae,
    ),
    "text_vae": _frozen(
        "the text VAE Optimus: optimus-vae.pth",
        RELEASED.format("/pretrained_pth/optimus-vae.pth"),
        (),
        frozen_sources.TEXT_VAE,
        frozen_sources.text_vae,
    ),
    "clip": _frozen(
        "CLIP ViT-L/14, by Hugging Face or by open_clip",
        "hf:openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41",
        (),
        frozen_sources.CLIP,
        frozen_sources.clip,
    ),
    "bert_tokenizer": _tokenizer(
        "BERT-base-cased's tokenizer: tokenizer.json or vocab.txt",
        "hf:google-bert/bert-base-cased@cd5ef92a9fb2f889e972770a36d4ed042daf221e",
        ("tokenizer.json", "vocab.txt"),
        frozen_sources.BERT_TOKENIZER,
        "encoder_vocabulary",
        tokenizer_files.bert_tokenizer,
    ),
    "gpt2_tokenizer": _tokenizer(
        "GPT-2's tokenizer: tokenizer.json, or vocab.json and merges.txt",
        "hf:openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
        ("tokenizer.json", "vocab.json", "merges.txt"),
        frozen_sources.GPT2_TOKENIZER,
        "decoder_vocabulary",
        tokenizer_files.gpt2_tokenizer,
    ),
}
