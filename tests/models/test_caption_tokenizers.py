"""The text VAE's fast tokenizers return the same ids as the plain ones of the published model.

The project does not contain the published vocabularies, so the tests train vocabularies of the same kinds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, trainers
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from vdtrain.models.tokenizers import DecoderTokenizer, EncoderTokenizer
from vdtrain.weights.frozen_parts import bert_tokenizer, gpt2_tokenizer

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
CAPTIONS = [
    "a red circle on a white background",
    "A  Large\tBLUE star, at the top-left!",
    "it's 3.14 o'clock; we'll see (or won't)",
    "café naïve ÉCOLE Straße",
    "日本語のキャプション 图片 한국어",
    "emoji 🙂👩‍👩‍👧 and zero\u200bwidth",
    "tabs\tand\nnewlines\r\nand\u00a0spaces",
    "unbelievableunsplittablewordofmanyletters",
    "...",
    "   leading and trailing   ",
    "$5 & 50% #hashtag @name http://example.org/a_b?c=d",
    "",
]
# GPT-2's rule for splitting text into words, from its published encoder.
GPT2_WORDS = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderTokenizer, BertTokenizerLegacy]:
    folder = tmp_path_factory.mktemp("bert")
    learnt = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learnt.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    learnt.train_from_iterator(
        [TEXT, *CAPTIONS[:4]], trainers.WordPieceTrainer(vocab_size=3000, special_tokens=specials)
    )
    entries = sorted(learnt.get_vocab(), key=learnt.token_to_id)
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n")
    fast = bert_tokenizer(folder, len(entries), "test")
    fast.save(str(folder / "fast.json"))
    plain = BertTokenizerLegacy(str(folder / "vocab.txt"), do_lower_case=False)
    return EncoderTokenizer(str(folder / "fast.json"), limit=1000), plain


@pytest.mark.parametrize("caption", CAPTIONS)
def test_berts_ids(bert: tuple[EncoderTokenizer, BertTokenizerLegacy], caption: str) -> None:
    fast, plain = bert
    expected = plain.convert_tokens_to_ids(["[CLS]", *plain.tokenize(caption.lower()), "[SEP]"])
    ids = fast([caption])[0].tolist()
    assert ids == [*expected, *[fast.pad] * (len(ids) - len(expected))]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderTokenizer, dict[str, int], list[tuple[str, str]]]:
    folder = tmp_path_factory.mktemp("gpt2")
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator([TEXT, *CAPTIONS[:6]], vocab_size=3000, special_tokens=["<|endoftext|>"])
    learnt.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines() if line[0] != "#"]
    fast = gpt2_tokenizer(folder, len(vocabulary) + 3, "test")
    fast.save(str(folder / "fast.json"))
    return DecoderTokenizer(str(folder / "fast.json")), vocabulary, [(first, second) for first, second in merges]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_gpt2s_ids(gpt2: tuple[DecoderTokenizer, dict[str, int], list[tuple[str, str]]], caption: str) -> None:
    fast, vocabulary, merges = gpt2
    spaced = " " + " ".join(caption.split()) if caption.strip() else ""
    expected = [vocabulary[piece] for piece in byte_pair_pieces(spaced, merges)]
    assert fast([caption])[0].tolist() == [fast.first, *expected, fast.last]


def byte_pair_pieces(text: str, merges: list[tuple[str, str]]) -> Iterator[str]:
    """Byte pair encoding by its definition: in each word, the pair with the lowest rank is joined, repeatedly."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    characters = byte_characters()
    for word in GPT2_WORDS.findall(text):
        pieces = [characters[byte] for byte in word.encode()]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            joined, place = [], 0
            while place < len(pieces):
                two = tuple(pieces[place : place + 2])
                joined.append("".join(two) if two == best else pieces[place])
                place += 2 if two == best else 1
            pieces = joined
        yield from pieces


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for every byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
