"""What comes of each source of `vdtrain weights import`: files, checked before any of them is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vdtrain.config.schema import ModelConfig
from vdtrain.files import refuse_existing, write_text, written_whole
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights import diffuser_sources, frozen_sources
from vdtrain.weights import frozen_sources as tokenizer_files
from vdtrain.weights.catalogue import SOURCES, pipeline_source
from vdtrain.weights.diffuser_sources import Opened
from vdtrain.weights.folder import Tracked, write_safetensors, write_weights_folder
from vdtrain.weights.frozen_sources import Convert, FrozenPart, Target
from vdtrain.weights.hub import fetched
from vdtrain.weights.tensor_files import SUFFIXES, LazyTensors, open_tensors

OUTPUT, PATH = "output", "path"


@dataclass(frozen=True)
class Product:
    """A file or folder that an import makes: checked, not yet written.

    Attributes:
        place: the setting that names it, and its value.
        summary: what it holds, for people.
        is_there: whether what stands there already is the same.
    """

    path: Path
    place: str
    summary: str
    write: Callable[[bool, Tracked], None]
    is_there: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Request:
    """An import: of what model, where the diffuser goes, and whether what is there may be replaced."""

    model: ModelConfig
    output: Path
    overwrite: bool


@dataclass(frozen=True)
class Reader:
    """How a source becomes files.

    Attributes:
        targets: the files of frozen parts that it makes, known before it is read.
        read: (local path, request) -> what comes of it.
    """

    targets: Callable[[ModelConfig], list[Target]]
    read: Callable[[Path, Request], list[Product]]


def products(name: str, path: str, request: Request) -> list[Product]:
    """Fetch and check what a source, by name, gives, without writing anything.

    Raises:
        ConfigError: the source cannot be read, is of another model, or something stands where it would go.
    """
    source, reader = SOURCES[name], READERS[name]
    if source.output is not None:
        refuse_existing(request.output, f"{OUTPUT}={request.output}", request.overwrite)
    for target in reader.targets(request.model):
        if target.path.suffix in SUFFIXES and target.path.suffix != ".safetensors":
            raise WeightsError(f"{target.place}: safetensors are made; give the file the ending .safetensors")
        refuse_existing(target.path, target.place, request.overwrite)
    local = fetched(path, source.parts)
    if source.output is not None and (other := pipeline_source(local)) not in (None, name):
        raise WeightsError(
            f"{PATH}={path}: a pipeline of diffusers for another source; `vdtrain weights import {other}` reads it"
        )
    found = reader.read(local, request)
    for product in found:
        refuse_existing(product.path, product.place, request.overwrite)
    return found


def source_of(file: str, model: ModelConfig) -> str | None:
    """The source whose import makes a file that the model's configuration names; None if there is none."""
    for name, reader in READERS.items():
        with contextlib.suppress(WeightsError):
            if any(target.path == Path(file).expanduser() for target in reader.targets(model)):
                return name
    return None


def _no_targets(model: ModelConfig) -> list[Target]:
    return []


def _diffuser(read: Callable[[Path, ModelConfig], Opened]) -> Reader:
    def made(path: Path, request: Request) -> list[Product]:
        opened = read(path, request.model)
        place = f"{OUTPUT}={request.output}"

        def write(overwrite: bool, tracked: Tracked) -> None:
            write_weights_folder(request.output, opened.diffuser, request.model, OUTPUT, overwrite, tracked)

        frozen = [
            product
            for part, convert, tensors in opened.frozen
            for product in _part_files(part, convert, tensors, request.model, f"{PATH}={path}")
            if request.overwrite or not product.is_there()
        ]
        return [Product(request.output, place, opened.diffuser.summary, write), *frozen]

    return Reader(_no_targets, made)


def _frozen(part: FrozenPart, convert: Convert) -> Reader:
    def made(path: Path, request: Request) -> list[Product]:
        # In a whole pipeline's folder the part has one of its own.
        inside = path / part.part if (path / part.part).is_dir() else path
        return _part_files(part, convert, open_tensors(inside, PATH), request.model, f"{PATH}={path}")

    return Reader(part.targets, made)


def _tokenizer(part: FrozenPart, size: str, read: Callable[[Path, int, str], Tokenizer]) -> Reader:
    def made(path: Path, request: Request) -> list[Product]:
        found = []
        for target in part.targets(request.model):
            tokenizer = read(path, target.specification[size], f"{PATH}={path}")
            summary = f"{tokenizer.get_vocab_size():,} entries"
            found.append(Product(target.path, target.place, summary, partial(_write_tokenizer, target, tokenizer)))
        return found

    return Reader(part.targets, made)


def _part_files(
    part: FrozenPart, convert: Convert, tensors: LazyTensors, model: ModelConfig, place: str
) -> list[Product]:
    found = []
    for target in part.targets(model):
        state = convert(tensors, target.specification, place)
        summary = LazyTensors.of(state).summary
        write, is_there = partial(_write_part, target, state), partial(_holds, target, state)
        found.append(Product(target.path, target.place, summary, write, is_there))
    return found


def _holds(target: Target, state: Mapping[str, Tensor]) -> bool:
    """Whether a part that was imported before has the same tensors."""
    if not target.path.is_file():
        return False
    there = open_tensors(target.path, target.setting)
    return there.keys() == state.keys() and all(
        there.entries[name].dtype == tensor.dtype and torch.equal(there[name], tensor) for name, tensor in state.items()
    )


def _write_part(target: Target, state: Mapping[str, Tensor], overwrite: bool, tracked: Tracked) -> None:
    with written_whole(target.path, target.place, overwrite) as draft:
        write_safetensors(draft, state)


def _write_tokenizer(target: Target, tokenizer: Tokenizer, overwrite: bool, tracked: Tracked) -> None:
    with written_whole(target.path, target.place, overwrite) as draft:
        write_text(draft, tokenizer.to_str(pretty=True))


READERS = {
    "versatile_diffusion": _diffuser(diffuser_sources.versatile_diffusion),
    "diffusers": _diffuser(diffuser_sources.diffusers),
    "safetensors": _diffuser(diffuser_sources.safetensors),
    "stable_diffusion": _diffuser(diffuser_sources.stable_diffusion),
    "image_vae": _frozen(frozen_sources.IMAGE_VAE, frozen_sources.image_vae),
    "text_vae": _frozen(frozen_sources.TEXT_VAE, frozen_sources.text_vae),
    "clip": _frozen(frozen_sources.CLIP, frozen_sources.clip),
    "bert_tokenizer": _tokenizer(frozen_sources.BERT_TOKENIZER, "encoder_vocabulary", tokenizer_files.bert_tokenizer),
    "gpt2_tokenizer": _tokenizer(frozen_sources.GPT2_TOKENIZER, "decoder_vocabulary", tokenizer_files.gpt2_tokenizer),
}
