"""The tokenizers of the frozen parts: BERT's and GPT-2's for the text VAE, CLIP's for text contexts.

CLIP's is a byte-level BPE on lower-cased text, cut and padded to the full context length.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from vdtrain.models.frozen_weights import WeightsError, load_tokenizer

# Lengths of padded captions are multiples of it: a GPU plans attention anew for every length that it meets.
LENGTH_STEP = 16
ENCODER_SPECIALS = ("[PAD]", "[CLS]", "[SEP]")
DECODER_SPECIALS = ("<PAD>", "<BOS>", "<EOS>")

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
# Entries of the vocabulary file that CLIP uses.
MERGES = 49152 - 256 - 2
SETTING = "context_encoder.tokenizer"
# The cache of word ids takes about 30 MB.
KNOWN_WORDS, LONGEST_WORD = 200_000, 32
# If a tokenizer joins words, the ids of this text differ from those of its single words.
PROBE = "two words, e\u0301t\u00e9 1984!  it's THE end"
ITEM = np.dtype(np.int64).itemsize


class EncoderTokenizer:
    """Captions to BERT ids as in Versatile Diffusion: lower-cased, cut, between [CLS] and [SEP].

    Args:
        path: `tokenizers` JSON file of a WordPiece model. The full size uses BERT-base-*cased* on lower-cased text,
            as the released text VAE does.
        limit: word pieces of a caption that are kept.
    """

    def __init__(self, path: str, limit: int) -> None:
        setting = "vae.encoder_tokenizer"
        self._tokenizer = load_tokenizer(path, setting)
        self._limit = limit
        ids = special_ids(self._tokenizer, ENCODER_SPECIALS, f"{setting}={path}")
        self.pad, self._first, self._last = ids

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids int64 [B, L], padded on the right with `pad`.

        L is the longest caption + 2, rounded up to a multiple of 16, and at most the limit + 2.
        """
        lowered = [caption.lower() for caption in captions]
        encoded = self._tokenizer.encode_batch_fast(lowered, add_special_tokens=False)
        rows = [[self._first, *row.ids[: self._limit], self._last] for row in encoded]
        longest = max(map(len, rows), default=0)
        return padded(rows, self.pad, min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self._limit + 2))


class DecoderTokenizer:
    """GPT-2 ids to captions, and captions to the decoder's target ids.

    Args:
        path: `tokenizers` JSON file of a byte-level BPE model. Optimus adds <PAD>, <BOS> and <EOS>, in this order, to
            GPT-2's 50,257 tokens. This class adds them if the file lacks them.
    """

    def __init__(self, path: str) -> None:
        setting = "vae.decoder_tokenizer"
        self._tokenizer = load_tokenizer(path, setting)
        self._tokenizer.add_special_tokens(list(DECODER_SPECIALS))
        self.pad, self.first, self.last = special_ids(self._tokenizer, DECODER_SPECIALS, f"{setting}={path}")

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids int64 [B, longest caption + 2], <BOS> ... <EOS>, padded on the right with `pad`.

        A space comes before every word, also the first, so that the same word always has the same ids.
        """
        spaced = [" " + " ".join(caption.split()) if caption.strip() else "" for caption in captions]
        encoded = self._tokenizer.encode_batch_fast(spaced, add_special_tokens=False)
        rows = [[self.first, *row.ids, self.last] for row in encoded]
        return padded(rows, self.pad, max(map(len, rows), default=0))

    def texts(self, ids: Tensor) -> list[str]:
        """Captions of generated ids [B, L]: the text before the first <EOS>, without special tokens."""
        rows = [row[: row.index(self.last)] if self.last in row else row for row in ids.tolist()]
        decoded: list[str] = self._tokenizer.decode_batch(rows, skip_special_tokens=True)
        return [text.strip() for text in decoded]


def special_ids(tokenizer: Tokenizer, names: Sequence[str], setting: str) -> list[int]:
    """Ids of the named special tokens.

    Raises:
        WeightsError: the vocabulary lacks one; the message names the tokenizer by `setting`.
    """
    ids = [tokenizer.token_to_id(name) for name in names]
    missing = [name for name, index in zip(names, ids, strict=True) if index is None]
    if missing:
        raise WeightsError(f"{setting}: has no {', '.join(missing)}; give the model's own tokenizer.json")
    return [index for index in ids if index is not None]


def padded(rows: Sequence[Sequence[int]], pad: int, length: int) -> Tensor:
    """Rows of ids as int64 [B, length], padded on the right."""
    ids = np.full((len(rows), length), pad, dtype=np.int64)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(ids)


class ClipTokenizer:
    """Captions to ids [B, L] between a start and an end id; the end id also pads the row, as in CLIP.

    Args:
        path: `tokenizers` JSON file whose last two ids are start and end; None reads CLIP's vocabulary from open_clip.
        length: L; longer captions lose their tail, never the end id.

    Raises:
        WeightsError: the file does not exist, or the tokenizer joins words across spaces.
    """

    def __init__(self, path: str | None, length: int) -> None:
        tokenizer = released_tokenizer() if path is None else load_tokenizer(path, SETTING)
        self._words = _WordIds(tokenizer)
        if self._words.of(PROBE) != self._words.encode(PROBE):
            raise WeightsError(f"{SETTING}={path}: joins words across spaces; give the tokenizer.json of a CLIP model")
        self._length = length
        self.size = tokenizer.get_vocab_size()
        self._start, end = _bytes([self.size - 2]), _bytes([self.size - 1])
        # The slice after n bytes of words pads the row, with at least one end id.
        self._end = end * (length - 1)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids int64 [B, L]."""
        kept = ITEM * (self._length - 2)
        rows = bytearray()
        for caption in captions:
            ids = self._words.of(caption)[:kept]
            rows += self._start + ids + self._end[len(ids) :]
        return torch.from_numpy(np.frombuffer(rows, np.int64).reshape(len(captions), self._length))


class _WordIds(dict[str, bytes]):
    """A cache of the ids of words, as int64 bytes. It is valid because CLIP's tokens never cross a space.

    Most words of a caption are common, so the cache saves most of the tokenizer's cleaning and splitting.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def of(self, caption: str) -> bytes:
        return b"".join(map(self.__getitem__, caption.split(" ")))

    def encode(self, text: str) -> bytes:
        return _bytes(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def __missing__(self, word: str) -> bytes:
        ids = self.encode(word)
        if len(word) <= LONGEST_WORD and len(self) < KNOWN_WORDS:
            self[word] = ids
        return ids


def _bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int64).tobytes()


def released_tokenizer() -> Tokenizer:
    """CLIP's own tokenizer (49,408 entries), from the vocabulary file in open_clip."""
    file = Path(open_clip.__file__).with_name(VOCABULARY_FILE)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        pairs = [line.split() for line in lines.read().split("\n")[1 : MERGES + 1]]
    return arranged(clip_model([(first, second) for first, second in pairs]))


def clip_model(merges: Sequence[tuple[str, str]]) -> BPE:
    """A BPE model with CLIP's order of ids: bytes, bytes that end a word, merges, start and end of text."""
    alphabet = _byte_characters()
    entries = [*alphabet, *(character + WORD_END for character in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {entry: index for index, entry in enumerate([*entries, START, END])}
    return BPE(vocabulary, list(merges), end_of_word_suffix=WORD_END)


def arranged(model: BPE) -> Tokenizer:
    """A tokenizer around a BPE model, with CLIP's rules for cleaning and splitting text."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte, in the order of GPT-2's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
