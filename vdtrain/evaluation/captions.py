"""How near captions are to the captions that people wrote, and how varied they are.

Words are those of COCO's evaluation: Penn Treebank's, in small letters, without punctuation. Its tokenizer is a Java
program; NLTK has the same rules.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest

# What COCO's evaluation removes.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'))
# Words that keep their full stop within a caption, beside those with a stop inside, such as u.s.
ABBREVIATIONS = frozenset(f"{word}." for word in ("mr", "mrs", "ms", "dr", "st", "jr", "sr", "no", "vs", "etc", "co"))
ORDER = 4
# Width of CIDEr-D's penalty for another length, in words.
SIGMA = 6.0

Words = list[str]
Grams = Counter[tuple[str, ...]]


def words(caption: str) -> Words:
    """The words of a caption as COCO's evaluation counts them."""
    from nltk.tokenize import TreebankWordTokenizer

    plain = re.sub(r"[\"\u201c\u201d]", " ", caption).replace("\u2019", "'")
    tokens = (token.lower() for token in TreebankWordTokenizer().tokenize(plain, convert_parentheses=True))
    return [token for token in map(_bare, tokens) if token not in PUNCTUATION]


def _bare(token: str) -> str:
    """A token without the full stop of a sentence: the rules split one off only at the end of the text."""
    stem = token.rstrip(".")
    if not stem or token in ABBREVIATIONS:
        return token
    return f"{stem}." if re.fullmatch(r"[a-z](\.[a-z])+", stem) else stem


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """BLEU-4 of a corpus (Papineni et al. 2002) in hundredths, without smoothing."""
    from sacrebleu.metrics.bleu import BLEU

    texts = [[" ".join(each) for each in own] for own in references]
    columns = [list(column) for column in zip_longest(*texts)]
    measure = BLEU(tokenize="none", smooth_method="none", force=True)
    return float(measure.corpus_score([" ".join(each) for each in captions], columns).score)


def cider(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """CIDEr-D (Vedantam et al. 2015), times 100 as papers print it; 0 for a single caption.

    The mean over captions, references and n = 1 ... 4 of 10 exp(-d^2 / 72) min(g, h).h / |g||h|, where d is the
    difference in words, and g and h are the counts of n-grams, each times the log of the share of images whose
    references have it.
    """
    counted = [[_grams(each) for each in own] for own in references]
    seen = Counter(gram for own in counted for gram in set(chain.from_iterable(own)))
    weight = {gram: math.log(len(references)) - math.log(count) for gram, count in seen.items()}
    unseen = math.log(len(references))
    total = 0.0
    for caption, own in zip(captions, counted, strict=True):
        mine = _grams(caption)
        total += sum(_likeness(mine, each, weight, unseen) for each in own) / len(own)
    return 100 * 10 * total / len(captions)


def _grams(text: Words) -> Grams:
    return Counter(tuple(text[start : start + n]) for n in range(1, ORDER + 1) for start in range(len(text) - n + 1))


def _likeness(mine: Grams, other: Grams, weight: dict[tuple[str, ...], float], unseen: float) -> float:
    products, squares, others = ([0.0] * (ORDER + 1) for _ in range(3))
    for gram, count in mine.items():
        value = count * weight.get(gram, unseen)
        squares[len(gram)] += value**2
        if gram in other:
            theirs = other[gram] * weight[gram]
            products[len(gram)] += min(value, theirs) * theirs
    for gram, count in other.items():
        others[len(gram)] += (count * weight[gram]) ** 2
    pairs = zip(products[1:], squares[1:], others[1:], strict=True)
    cosines = sum(product / math.sqrt(square * theirs) for product, square, theirs in pairs if square and theirs)
    difference = sum(mine[gram] for gram in mine if len(gram) == 2) - sum(
        other[gram] for gram in other if len(gram) == 2
    )
    return cosines / ORDER * math.exp(-(difference**2) / (2 * SIGMA**2))


def distinct(captions: Sequence[Words], n: int) -> float:
    """The share of different n-grams among all n-grams of the captions (Li et al. 2016), in 0..1."""
    grams = [tuple(text[start : start + n]) for text in captions for start in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def caption_figures(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU, CIDEr-D and distinct-n of captions against the references of each."""
    made = [words(caption) for caption in captions]
    real = [[words(each) for each in own] for own in references]
    found = {f"distinct_{n}": distinct(made, n) for n in (1, 2)}
    return {"bleu": bleu(made, real), "cider": cider(made, real), **found}
