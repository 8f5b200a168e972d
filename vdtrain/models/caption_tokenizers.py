"""The two tokenizers of the text VAE: word pieces into its BERT encoder, byte-level BPE out of its GPT-2 decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from vdtrain.models.frozen_weights import WeightsError, load_tokenizer

ENCODER_SPECIALS = ("[PAD]", "[CLS]", "[SEP]")
DECODER_SPECIALS = ("<PAD>", "<BOS>", "<EOS>")


class EncoderTokenizer:
    """Captions to BERT ids as Versatile Diffusion makes them: lower case, cut, between [CLS] and [SEP].

    Args:
        path: `tokenizers` JSON file of a WordPiece model. The full size has BERT-base-*cased*: lower-casing happens
            here, on that vocabulary, because the released text VAE was used so.
        limit: word pieces that are kept of a caption.
    """

    def __init__(self, path: str, limit: int) -> None:
        setting = "vae.encoder_tokenizer"
        self._tokenizer = load_tokenizer(path, setting)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._limit = limit
        ids = special_ids(self._tokenizer, ENCODER_SPECIALS, f"{setting}={path}")
        self.pad, self._first, self._last = ids

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids int64 [B, longest caption + 2], padded on the right with `pad`."""
        lowered = [caption.lower() for caption in captions]
        encoded = self._tokenizer.encode_batch_fast(lowered, add_special_tokens=False)
        return padded([[self._first, *row.ids[: self._limit], self._last] for row in encoded], self.pad)


class DecoderTokenizer:
    """GPT-2 ids to captions, and captions to the ids that the decoder is trained to say.

    Args:
        path: `tokenizers` JSON file of a byte-level BPE model. Optimus adds <PAD>, <BOS> and <EOS>, in this order, to
            GPT-2's 50,257 tokens; a file without them gets them here.
    """

    def __init__(self, path: str) -> None:
        setting = "vae.decoder_tokenizer"
        self._tokenizer = load_tokenizer(path, setting)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.add_special_tokens(list(DECODER_SPECIALS))
        self.pad, self.first, self.last = special_ids(self._tokenizer, DECODER_SPECIALS, f"{setting}={path}")

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids int64 [B, longest caption + 2], <BOS> ... <EOS>, padded on the right with `pad`.

        Every word has a space before it, the first one too, so that a word has one id wherever it stands.
        """
        spaced = [" " + " ".join(caption.split()) if caption.strip() else "" for caption in captions]
        encoded = self._tokenizer.encode_batch_fast(spaced, add_special_tokens=False)
        return padded([[self.first, *row.ids, self.last] for row in encoded], self.pad)

    def texts(self, ids: Tensor) -> list[str]:
        """Captions of generated ids [B, L]: what stands before the first <EOS>, without special tokens."""
        rows = [row[: row.index(self.last)] if self.last in row else row for row in ids.tolist()]
        decoded: list[str] = self._tokenizer.decode_batch(rows, skip_special_tokens=True)
        return [text.strip() for text in decoded]


def special_ids(tokenizer: Tokenizer, names: Sequence[str], setting: str) -> list[int]:
    """Ids of the named special tokens.

    Raises:
        WeightsError: the vocabulary lacks one; `setting` names where the tokenizer comes from.
    """
    ids = [tokenizer.token_to_id(name) for name in names]
    missing = [name for name, index in zip(names, ids, strict=True) if index is None]
    if missing:
        raise WeightsError(f"{setting}: has no {', '.join(missing)}; give it the tokenizer.json of the model")
    return [index for index in ids if index is not None]


def padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Rows of ids as int64 [B, longest row], filled up on the right."""
    ids = np.full((len(rows), max((len(row) for row in rows), default=0)), pad, dtype=np.int64)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(ids)
