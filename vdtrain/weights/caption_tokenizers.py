"""The text VAE's two tokenizers, from every form in which they are published."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece

from vdtrain.config.command_schema import WeightsConfig
from vdtrain.errors import one_line
from vdtrain.files import write_text, written_whole
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.models.tokenizers import DECODER_SPECIALS, ENCODER_SPECIALS, special_ids
from vdtrain.weights.frozen_parts import BERT_TOKENIZER, GPT2_TOKENIZER, FrozenPart, Target, fetched_part
from vdtrain.weights.imports import PATH, Output

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
