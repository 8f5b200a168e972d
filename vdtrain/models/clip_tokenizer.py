"""CLIP's tokenizer: byte-level BPE on lower-cased text, cut and padded to the full context length."""

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

from vdtrain.models.frozen_weights import load_tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2
"""Entries of the vocabulary file that CLIP uses."""


class ClipTokenizer:
    """Captions to ids [B, L], between a start and an end id; the end id also fills up the row, as in CLIP's.

    Args:
        path: `tokenizers` JSON file whose last two ids are start and end; None reads CLIP's vocabulary from open_clip.
        length: L; longer captions lose their tail, never the end id.
    """

    def __init__(self, path: str | None, length: int) -> None:
        self._tokenizer = released_tokenizer() if path is None else load_tokenizer(path, "context_encoder.tokenizer")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._length = length
        self.size = self._tokenizer.get_vocab_size()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids int64 [B, L]."""
        start, end = self.size - 2, self.size - 1
        ids = np.full((len(captions), self._length), end, dtype=np.int64)
        ids[:, 0] = start
        # Without places in the text, which nobody asks for here.
        encoded = self._tokenizer.encode_batch_fast(captions, add_special_tokens=False)
        for row, caption in zip(ids, encoded, strict=True):
            kept = caption.ids[: self._length - 2]
            row[1 : 1 + len(kept)] = kept
        return torch.from_numpy(ids)


def released_tokenizer() -> Tokenizer:
    """CLIP's own tokenizer (49,408 entries) from the vocabulary file that open_clip brings along."""
    file = Path(open_clip.__file__).with_name(VOCABULARY_FILE)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        pairs = [line.split() for line in lines.read().split("\n")[1 : MERGES + 1]]
    return arranged(clip_model([(first, second) for first, second in pairs]))


def clip_model(merges: Sequence[tuple[str, str]]) -> BPE:
    """BPE model with CLIP's order of ids: bytes, bytes that end a word, merges, start and end of text."""
    alphabet = _byte_characters()
    entries = [*alphabet, *(character + WORD_END for character in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {entry: index for index, entry in enumerate([*entries, START, END])}
    return BPE(vocabulary, list(merges), end_of_word_suffix=WORD_END)


def arranged(model: BPE) -> Tokenizer:
    """A tokenizer around a BPE model with CLIP's way of cleaning and splitting text."""
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
