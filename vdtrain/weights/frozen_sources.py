"""Published weights of the frozen parts as what the model's configuration reads, checked against it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from torch import Tensor

from vdtrain.config.instantiate import instantiate
from vdtrain.config.schema import ModelConfig
from vdtrain.errors import one_line
from vdtrain.models.clip import ClipImageContext, ClipTextContext, build_clip
from vdtrain.models.frozen_weights import ASSET, WeightsError, compare
from vdtrain.models.image_vae import ImageVAE
from vdtrain.models.optimus import Optimus
from vdtrain.models.tokenizers import DECODER_SPECIALS, ENCODER_SPECIALS, special_ids
from vdtrain.weights import layouts
from vdtrain.weights.frozen_names import to_diffusers, to_open_clip
from vdtrain.weights.tensor_files import LazyTensors

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
RELEASED_ENCODER = {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102}
RELEASED_ENCODER_SIZE = 28_996


def bert_tokenizer(path: Path, size: int, place: str) -> Tokenizer:
    """The encoder's tokenizer.

    Args:
        path: `tokenizer.json` or `vocab.txt` of BERT-base-cased, or a folder with either.
        size: entries that the model has.
        place: the setting and its value, for errors.

    Raises:
        WeightsError: no such tokenizer, or not the model's.
    """
    tokenizer = _read(path, ("vocab.txt",), _word_pieces, place)
    if tokenizer.get_vocab_size() != size:
        raise WeightsError(
            f"{place}: {tokenizer.get_vocab_size()} entries, and encoder_vocabulary={size}; the text VAE of Versatile "
            "Diffusion has BERT-base-cased"
        )
    ids = dict(zip(ENCODER_SPECIALS, special_ids(tokenizer, ENCODER_SPECIALS, place), strict=True))
    if ids["[PAD]"] != 0 or (size == RELEASED_ENCODER_SIZE and ids != RELEASED_ENCODER):
        raise WeightsError(
            f"{place}: its special tokens are {ids}, not those of BERT-base-cased; give its tokenizer.json"
        )
    return tokenizer


def gpt2_tokenizer(path: Path, size: int, place: str) -> Tokenizer:
    """The decoder's tokenizer: GPT-2's with <PAD>, <BOS> and <EOS> after it.

    Args:
        path: `tokenizer.json` of GPT-2, or a folder with it or with `vocab.json` and `merges.txt`.
        size: entries that the model has, the three included.
        place: the setting and its value, for errors.

    Raises:
        WeightsError: no such tokenizer, or not the model's.
    """
    tokenizer = _read(path, ("vocab.json", "merges.txt"), _byte_pairs, place)
    tokenizer.add_special_tokens(list(DECODER_SPECIALS))
    ids = special_ids(tokenizer, DECODER_SPECIALS, place)
    if tokenizer.get_vocab_size() != size or ids != [size - 3, size - 2, size - 1]:
        raise WeightsError(
            f"{place}: {tokenizer.get_vocab_size()} entries with {', '.join(DECODER_SPECIALS)} as {ids}, and "
            f"decoder_vocabulary={size}, of which they are the last three; the released text VAE has GPT-2"
        )
    return tokenizer


def _read(path: Path, names: tuple[str, ...], build: Callable[..., Tokenizer], place: str) -> Tokenizer:
    """Read `tokenizer.json`, else build from the vocabulary files `names`."""
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
    except Exception as error:  # the library raises bare Exception
        reason = one_line(error)[:200]
        raise WeightsError(
            f"{place}: no tokenizer ({reason}); give {TOKENIZER_FILE} or {' and '.join(names)}"
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


Specification = Mapping[str, Any]
CAUSAL_MASK = re.compile(r"decoder\.transformer\.h\.\d+\.attn\.bias")
WORDS, HEAD = "decoder.transformer.wte.weight", "decoder.lm_head.weight"
# Constants among the weights: places of tokens and what stands for a masked score, by older versions of transformers
# and open_clip; the sizes in OpenAI's own file.
CONSTANTS = re.compile(r"(.*\.)?(position_ids|masked_bias|attn_mask)|input_resolution|context_length|vocab_size")
# CLIP's factor on its scores, as a logarithm: trained to its limit, and of no use to embeddings.
SCALE, TRAINED_SCALE = "logit_scale", math.log(100)


@dataclass(frozen=True)
class Target:
    """A file that the model's configuration names, and the part that reads it.

    Attributes:
        setting: that holds the path.
        specification: of the part, its `_target_` and arguments.
    """

    setting: str
    path: Path
    specification: Specification

    @property
    def place(self) -> str:
        return f"{self.setting}={self.path}"


@dataclass(frozen=True)
class FrozenPart:
    """Where a frozen part stands in the configuration of a modality, and which classes it is made of."""

    part: str
    kinds: tuple[type, ...]
    argument: str = "weights"

    def targets(self, model: ModelConfig) -> list[Target]:
        """The files that hold it, each once.

        Raises:
            WeightsError: the model has no such part, or names no file of the user's for it.
        """
        found: dict[Path, Target] = {}
        for name, modality in model.modalities.items():
            specification = getattr(modality, self.part)
            target = get_object(str(specification.get("_target_")))
            if not (isinstance(target, type) and issubclass(target, self.kinds)):
                continue
            setting = f"model.modalities.{name}.{self.part}.{self.argument}"
            path = specification.get(self.argument)
            if path is None or str(path).startswith(ASSET):
                raise WeightsError(f"{setting}={path}: no file to write to; set it to the file that is to be made")
            found.setdefault(Path(path).expanduser(), Target(setting, Path(path).expanduser(), specification))
        if not found:
            kinds = " or ".join(kind.__name__ for kind in self.kinds)
            raise WeightsError(f"model.modalities: none has a {self.part} of {kinds} in model={model.name}")
        return list(found.values())


IMAGE_VAE = FrozenPart("vae", (ImageVAE,))
TEXT_VAE = FrozenPart("vae", (Optimus,))
CLIP = FrozenPart("context_encoder", (ClipTextContext, ClipImageContext))
BERT_TOKENIZER = FrozenPart("vae", (Optimus,), "encoder_tokenizer")
GPT2_TOKENIZER = FrozenPart("vae", (Optimus,), "decoder_tokenizer")

Convert = Callable[[Mapping[str, Tensor], Specification, str], dict[str, Tensor]]
"""(published tensors, the part's specification, the place for errors) -> the part's tensors, in the precision given."""


def image_vae(tensors: Mapping[str, Tensor], specification: Specification, place: str) -> dict[str, Tensor]:
    """CompVis' kl-f8, alone or within Stable Diffusion, or diffusers' AutoencoderKL."""
    state = to_diffusers(_part(tensors, (layouts.IMAGE_VAE,), place, "the image VAE"))
    built = _without_values(specification)
    _check(built.autoencoder.state_dict(), state, place, "the image VAE (kl-f8.pth, or a vae folder of diffusers)")
    return state


def text_vae(tensors: Mapping[str, Tensor], specification: Specification, place: str) -> dict[str, Tensor]:
    """Optimus, without what follows from the rest: causal masks, and the head, which is the word embedding."""
    state = dict(_part(tensors, (layouts.TEXT_VAE,), place, "the text VAE"))
    for name in [name for name in state if CAUSAL_MASK.fullmatch(name)]:
        mask = state.pop(name)
        if mask.ndim < 2 or not torch.equal(mask.float(), torch.ones_like(mask, dtype=torch.float).tril()):
            raise WeightsError(f"{place}: {name} is no causal mask; give the released optimus-vae.pth")
    head = state.pop(HEAD, None)
    if head is not None and not (WORDS in state and torch.equal(head, state[WORDS])):
        raise WeightsError(
            f"{place}: {HEAD} differs from {WORDS}, and they are one in this model; give optimus-vae.pth"
        )
    expected = _without_values({**specification, "encoder_tokenizer": None, "decoder_tokenizer": None}).state_dict()
    expected.pop(HEAD)
    _check(expected, state, place, "the text VAE (optimus-vae.pth)")
    return state


def clip(tensors: Mapping[str, Tensor], specification: Specification, place: str) -> dict[str, Tensor]:
    """CLIP by open_clip or by Hugging Face."""
    state = dict(_part(tensors, (layouts.CLIP, layouts.OPEN_CLIP), place, "CLIP"))
    if any(name.startswith("text_model.") for name in state):
        state = to_open_clip(state)
    # open_clip's class for other text networks keeps this one apart.
    state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    if (scale := state.setdefault(SCALE, torch.tensor(TRAINED_SCALE))).numel() == 1:
        state[SCALE] = scale.reshape(())
    with torch.device("meta"):
        expected = build_clip(specification["architecture"], None).state_dict()
    _check(expected, state, place, f"CLIP {specification['architecture']}")
    return state


def _part(tensors: Mapping[str, Tensor], kinds: Sequence[layouts.Layout], place: str, what: str) -> LazyTensors:
    """The tensors of a part alone, out of a file that may hold a whole model.

    Raises:
        WeightsError: the file does not hold the part.
    """
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
