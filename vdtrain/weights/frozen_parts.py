"""Frozen parts of the model: where their files are, what published weights become, and the text VAE's tokenizers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from torch import Tensor

from vdtrain.config.command_schema import WeightsConfig
from vdtrain.config.instantiate import instantiate
from vdtrain.config.schema import ModelConfig
from vdtrain.errors import one_line
from vdtrain.files import refuse_existing, write_text, written_whole
from vdtrain.models.clip import ClipImageContext, ClipTextContext, build_clip
from vdtrain.models.frozen_weights import ASSET, WeightsError, compare
from vdtrain.models.image_vae import ImageVAE
from vdtrain.models.optimus import Optimus
from vdtrain.models.tokenizers import DECODER_SPECIALS, ENCODER_SPECIALS, special_ids
from vdtrain.weights.folder import write_safetensors
from vdtrain.weights.hub import fetched
from vdtrain.weights.imports import PATH, Output
from vdtrain.weights.published import layouts
from vdtrain.weights.published.frozen_names import to_diffusers, to_open_clip
from vdtrain.weights.tensor_files import SUFFIXES, LazyTensors, equal, open_tensors

Specification = Mapping[str, Any]
CAUSAL_MASK = re.compile(r"decoder\.transformer\.h\.\d+\.attn\.bias")
WORDS, HEAD = "decoder.transformer.wte.weight", "decoder.lm_head.weight"
# Constants among the weights: positions and masked scores by older versions of transformers and open_clip, and sizes
# in OpenAI's own file.
CONSTANTS = re.compile(r"(.*\.)?(position_ids|masked_bias|attn_mask)|input_resolution|context_length|vocab_size")
# The logarithm of CLIP's factor on its scores. It was trained to its limit, and embeddings do not use it.
SCALE, TRAINED_SCALE = "logit_scale", math.log(100)


@dataclass(frozen=True)
class Target:
    """A file that the model's configuration names for a part.

    Attributes:
        setting: the setting with the path.
        specification: the part's `_target_` and arguments.
    """

    setting: str
    path: Path
    specification: Specification

    @property
    def place(self) -> str:
        return f"{self.setting}={self.path}"


@dataclass(frozen=True)
class FrozenPart:
    """A frozen part of the model, or the tokenizer of one.

    Attributes:
        source: the source of `vdtrain weights import`.
        name: of the part in a modality's configuration.
        kinds: classes of the part.
        argument: the class's argument that names the file.
        needed: files that an import needs of a repository; none for all weights.
    """

    source: str
    name: str
    kinds: tuple[type, ...]
    argument: str = "weights"
    needed: tuple[str, ...] = ()

    def targets(self, model: ModelConfig) -> list[Target]:
        """The files that an import writes, each once.

        Raises:
            WeightsError: the model has no such part, or the configuration names no file of the user's for it.
        """
        found: dict[Path, Target] = {}
        for name, modality in model.modalities.items():
            specification = getattr(modality, self.name)
            target = specification.get("_target_")
            kind = None if target is None else get_object(str(target))
            if not (isinstance(kind, type) and issubclass(kind, self.kinds)):
                continue
            setting = f"model.modalities.{name}.{self.name}.{self.argument}"
            path = specification.get(self.argument)
            if path is None or str(path).startswith(ASSET):
                raise WeightsError(
                    f"{setting}={path}: not a file to write to; set it to the file that the import makes"
                )
            found.setdefault(Path(path).expanduser(), Target(setting, Path(path).expanduser(), specification))
        if not found:
            kinds = " or ".join(kind.__name__ for kind in self.kinds)
            raise WeightsError(f"model.modalities: no {self.name} of model={model.name} is a {kinds}")
        return list(found.values())


IMAGE_VAE = FrozenPart("image_vae", "vae", (ImageVAE,))
TEXT_VAE = FrozenPart("text_vae", "vae", (Optimus,))
CLIP = FrozenPart("clip", "context_encoder", (ClipTextContext, ClipImageContext))
BERT_TOKENIZER = FrozenPart("bert_tokenizer", "vae", (Optimus,), "encoder_tokenizer", ("tokenizer.json", "vocab.txt"))
GPT2_TOKENIZER = FrozenPart(
    "gpt2_tokenizer", "vae", (Optimus,), "decoder_tokenizer", ("tokenizer.json", "vocab.json", "merges.txt")
)
PARTS = (IMAGE_VAE, TEXT_VAE, CLIP, BERT_TOKENIZER, GPT2_TOKENIZER)


def fetched_part(part: FrozenPart, path: str, config: WeightsConfig) -> Path:
    """The local path of a published part. Where its files will go is checked first.

    Raises:
        ConfigError: the part cannot be fetched, or one of its files exists already.
    """
    for target in part.targets(config.model):
        if target.path.suffix in SUFFIXES and target.path.suffix != ".safetensors":
            raise WeightsError(f"{target.place}: a safetensors file is made; give it the ending .safetensors")
        refuse_existing(target.path, target.place, config.overwrite)
    return fetched(path, part.needed)


def part_outputs(part: FrozenPart, path: str, config: WeightsConfig) -> list[Output]:
    """What an import of a part's weights will write.

    Raises:
        ConfigError: the weights cannot be read or are of another model, or a file exists already.
    """
    local = fetched_part(part, path, config)
    # In the folder of a whole pipeline the part has a folder of its own.
    inside = local / part.name if (local / part.name).is_dir() else local
    return outputs_of({part: open_tensors(inside, PATH)}, local, config)


def outputs_of(frozen: Mapping[FrozenPart, LazyTensors], path: Path, config: WeightsConfig) -> list[Output]:
    """What an import of several parts will write. A file that exists with the same tensors is left out.

    Raises:
        ConfigError: as `part_outputs`.
    """
    outputs = []
    for part, tensors in frozen.items():
        for target in part.targets(config.model):
            state = CONVERTERS[part](tensors, target.specification, f"{PATH}={path}")
            made = target.path.is_file() and equal(open_tensors(target.path, target.setting), state)
            if config.overwrite or not made:
                refuse_existing(target.path, target.place, config.overwrite)
                write = partial(_write_part, target, state, config.overwrite)
                outputs.append(Output(target.path, LazyTensors.of(state).summary, write))
    return outputs


def _write_part(target: Target, state: Mapping[str, Tensor], overwrite: bool) -> None:
    with written_whole(target.path, target.place, overwrite) as draft:
        write_safetensors(draft, state)


def image_vae(tensors: Mapping[str, Tensor], specification: Specification, place: str) -> dict[str, Tensor]:
    """From CompVis' kl-f8, alone or in Stable Diffusion, or from diffusers' AutoencoderKL."""
    state = to_diffusers(_part(tensors, (layouts.IMAGE_VAE,), place, "the image VAE"))
    built = _without_values(specification)
    _check(built.autoencoder.state_dict(), state, place, "the image VAE (kl-f8.pth, or a diffusers vae folder)")
    return state


def text_vae(tensors: Mapping[str, Tensor], specification: Specification, place: str) -> dict[str, Tensor]:
    """From Optimus. Causal masks are dropped, and so is the head, which is the word embedding."""
    state = dict(_part(tensors, (layouts.TEXT_VAE,), place, "the text VAE"))
    for name in [name for name in state if CAUSAL_MASK.fullmatch(name)]:
        mask = state.pop(name)
        if mask.ndim < 2 or not torch.equal(mask.float(), torch.ones_like(mask, dtype=torch.float).tril()):
            raise WeightsError(f"{place}: {name} is not a causal mask; give the released optimus-vae.pth")
    head = state.pop(HEAD, None)
    if head is not None and not (WORDS in state and torch.equal(head, state[WORDS])):
        raise WeightsError(
            f"{place}: {HEAD} differs from {WORDS}, but this model has one tensor for both; give optimus-vae.pth"
        )
    expected = _without_values({**specification, "encoder_tokenizer": None, "decoder_tokenizer": None}).state_dict()
    expected.pop(HEAD)
    _check(expected, state, place, "the text VAE (optimus-vae.pth)")
    return state


def clip(tensors: Mapping[str, Tensor], specification: Specification, place: str) -> dict[str, Tensor]:
    """From CLIP by open_clip or by Hugging Face."""
    state = dict(_part(tensors, (layouts.CLIP, layouts.OPEN_CLIP), place, "CLIP"))
    if any(name.startswith("text_model.") for name in state):
        state = to_open_clip(state)
    # open_clip's class for other text networks adds "text." to these names.
    state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    if (scale := state.setdefault(SCALE, torch.tensor(TRAINED_SCALE))).numel() == 1:
        state[SCALE] = scale.reshape(())
    with torch.device("meta"):
        expected = build_clip(specification["architecture"], None).state_dict()
    _check(expected, state, place, f"CLIP {specification['architecture']}")
    return state


def _part(tensors: Mapping[str, Tensor], kinds: Sequence[layouts.Layout], place: str, what: str) -> LazyTensors:
    """The tensors of one part, from a file that may hold a whole model."""
    prefixes = [prefix for kind in kinds for prefix in kind.prefixes(tensors)]
    if not prefixes:
        raise WeightsError(f"{place}: not {what}; it holds {layouts.contents(tensors)}")
    found = layouts.below(tensors, prefixes[0])
    return found.renamed({name: name for name in found if not CONSTANTS.fullmatch(name)})


def _without_values(specification: Specification) -> Any:
    """A part on the meta device: names and shapes."""
    with torch.device("meta"):
        return instantiate({**specification, "weights": None}, "model.modalities")


def _check(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], place: str, what: str) -> None:
    if differences := compare(expected, found):
        raise WeightsError(f"{place}: not {what} that the model's configuration describes: {differences}")


Convert = Callable[[Mapping[str, Tensor], Specification, str], dict[str, Tensor]]
"""(published tensors, the part's specification, the place for errors) -> the part's tensors, in their precision."""

CONVERTERS: dict[FrozenPart, Convert] = {IMAGE_VAE: image_vae, TEXT_VAE: text_vae, CLIP: clip}


TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
RELEASED_ENCODER = {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102}
RELEASED_ENCODER_SIZE = 28_996


def tokenizer_outputs(part: FrozenPart, path: str, config: WeightsConfig) -> list[Output]:
    """What an import of a tokenizer will write.

    Raises:
        ConfigError: the tokenizer cannot be read or is another one, or a file exists already.
    """
    local = fetched_part(part, path, config)
    read, size = TOKENIZERS[part]
    outputs = []
    for target in part.targets(config.model):
        tokenizer = read(local, target.specification[size], f"{PATH}={local}")
        write = partial(_write_tokenizer, target, tokenizer, config.overwrite)
        outputs.append(Output(target.path, f"{tokenizer.get_vocab_size():,} entries", write))
    return outputs


def bert_tokenizer(path: Path, size: int, place: str) -> Tokenizer:
    """The encoder's tokenizer.

    Args:
        path: `tokenizer.json` or `vocab.txt` of BERT-base-cased, or a folder with either.
        size: the model's number of entries.
        place: the setting and its value, for errors.

    Raises:
        WeightsError: the tokenizer cannot be read, or is not the model's.
    """
    tokenizer = _read(path, ("vocab.txt",), _word_pieces, place)
    if tokenizer.get_vocab_size() != size:
        raise WeightsError(
            f"{place}: {tokenizer.get_vocab_size()} entries, but encoder_vocabulary={size}; give BERT-base-cased, the "
            "tokenizer of Versatile Diffusion"
        )
    ids = dict(zip(ENCODER_SPECIALS, special_ids(tokenizer, ENCODER_SPECIALS, place), strict=True))
    if ids["[PAD]"] != 0 or (size == RELEASED_ENCODER_SIZE and ids != RELEASED_ENCODER):
        raise WeightsError(
            f"{place}: its special tokens are {ids}, not those of BERT-base-cased; give the tokenizer.json of that"
        )
    return tokenizer


def gpt2_tokenizer(path: Path, size: int, place: str) -> Tokenizer:
    """The decoder's tokenizer: GPT-2's, followed by <PAD>, <BOS> and <EOS>.

    Args:
        path: `tokenizer.json` of GPT-2, or a folder with it or with `vocab.json` and `merges.txt`.
        size: the model's number of entries, with these three.
        place: the setting and its value, for errors.

    Raises:
        WeightsError: no such tokenizer, or not the model's.
    """
    tokenizer = _read(path, ("vocab.json", "merges.txt"), _byte_pairs, place)
    tokenizer.add_special_tokens(list(DECODER_SPECIALS))
    ids = special_ids(tokenizer, DECODER_SPECIALS, place)
    if tokenizer.get_vocab_size() != size or ids != [size - 3, size - 2, size - 1]:
        raise WeightsError(
            f"{place}: {tokenizer.get_vocab_size()} entries with {', '.join(DECODER_SPECIALS)} as {ids}, but "
            f"these must be the last three of decoder_vocabulary={size}; give GPT-2, the released tokenizer"
        )
    return tokenizer


def _read(path: Path, names: tuple[str, ...], build: Callable[..., Tokenizer], place: str) -> Tokenizer:
    """Read `tokenizer.json`; without it, build the tokenizer from the vocabulary files `names`."""
    if path.is_file():
        folder, whole = path.parent, path.name not in names
    else:
        folder, whole = path, (path / TOKENIZER_FILE).is_file()
        path = path / TOKENIZER_FILE
    try:
        if whole:
            return Tokenizer.from_file(str(path))
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise WeightsError(
                f"{place}: no {' and '.join(absent)} there; give {TOKENIZER_FILE} or {' and '.join(names)}"
            )
        return build(*(folder / name for name in names))
    except WeightsError:
        raise
    except Exception as error:  # the library raises plain Exception
        reason = one_line(error)[:200]
        raise WeightsError(
            f"{place}: not a tokenizer ({reason}); give {TOKENIZER_FILE} or {' and '.join(names)}"
        ) from error


def _word_pieces(vocabulary: Path) -> Tokenizer:
    entries = vocabulary.read_text(encoding="utf-8").splitlines()
    tokenizer = Tokenizer(WordPiece({entry: index for index, entry in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([entry for entry in entries if entry in (*ENCODER_SPECIALS, "[UNK]", "[MASK]")])
    return tokenizer


def _byte_pairs(vocabulary: Path, merges: Path) -> Tokenizer:
    tokenizer = Tokenizer(BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=True)])
    return tokenizer


# How to read a tokenizer, and the part's argument with its number of entries.
TOKENIZERS: dict[FrozenPart, tuple[Callable[[Path, int, str], Tokenizer], str]] = {
    BERT_TOKENIZER: (bert_tokenizer, "encoder_vocabulary"),
    GPT2_TOKENIZER: (gpt2_tokenizer, "decoder_vocabulary"),
}


def _write_tokenizer(target: Target, tokenizer: Tokenizer, overwrite: bool) -> None:
    with written_whole(target.path, target.place, overwrite) as draft:
        write_text(draft, tokenizer.to_str(pretty=True))
