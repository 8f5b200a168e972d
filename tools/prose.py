"""How long the sentences of the pages are; `make lint` fails where they are too long to read.

python -m tools.prose [FILE...]        README.md and docs/*.md unless files are named, docs/log.md left out

A page is a Markdown text. Code blocks, tables, headings, images and the addresses of links are not prose, and neither
is a bold heading in front of a paragraph. Code in a sentence is one word. A bullet and a paragraph end a sentence.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
# Of a page's average sentence, and of its longest.
MEAN_WORDS, MEAN_COMMAS, WORDS = 22.0, 1.8, 40
# A full stop behind these ends no sentence.
ABBREVIATIONS = ("al", "e.g", "i.e", "vs")
NO_ABBREVIATION = "".join(rf"(?<!\b{re.escape(word)})" for word in ABBREVIATIONS)
END = re.compile(rf"(?:{NO_ABBREVIATION}\.|[!?])[\"')\]]*\s+")
CODE = "X"


@dataclass(frozen=True)
class Sentence:
    """Of the paragraph that begins in `line`, counted from 1."""

    line: int
    text: str

    @property
    def words(self) -> int:
        return len(re.findall(r"\S*\w\S*", self.text))

    @property
    def commas(self) -> int:
        """Commas and semicolons, but not those of a number."""
        return len(re.findall(r"[,;](?!\w)", self.text))


@dataclass(frozen=True)
class Page:
    """Sentences of one text."""

    name: str
    sentences: tuple[Sentence, ...]

    @property
    def mean_words(self) -> float:
        return fmean(sentence.words for sentence in self.sentences)

    @property
    def mean_commas(self) -> float:
        return fmean(sentence.commas for sentence in self.sentences)

    @property
    def longest(self) -> Sentence:
        return max(self.sentences, key=lambda sentence: sentence.words)

    def faults(self) -> Iterator[str]:
        """A line for each limit that the page exceeds."""
        if self.mean_words > MEAN_WORDS:
            yield f"{self.name}: {self.mean_words:.1f} words a sentence, at most {MEAN_WORDS:g}; split sentences"
        if self.mean_commas > MEAN_COMMAS:
            yield f"{self.name}: {self.mean_commas:.1f} commas a sentence, at most {MEAN_COMMAS:g}; split sentences"
        for sentence in self.sentences:
            if sentence.words > WORDS:
                place = f"{self.name}:{sentence.line}"
                yield f"{place}: a sentence of {sentence.words} words, at most {WORDS}: {sentence.text}"


def read(name: str, text: str) -> Page:
    """The sentences of a Markdown text."""
    return Page(name, tuple(_sentences(MarkdownIt("commonmark").enable("table").parse(text))))


def _sentences(tokens: list[Token]) -> Iterator[Sentence]:
    for before, token in pairwise(tokens):
        if before.type == "paragraph_open" and before.map is not None:
            text = _prose(token.children or [])
            for sentence in filter(str.strip, END.sub(lambda end: end[0].rstrip() + "\n", text).split("\n")):
                yield Sentence(before.map[0] + 1, sentence)


def _prose(tokens: list[Token]) -> str:
    """The words of a paragraph in one line, code as one word."""
    words = {"code_inline": CODE, "softbreak": " ", "hardbreak": " "}
    parts = [words.get(token.type, token.content if token.type == "text" else "") for token in tokens]
    types = [token.type for token in tokens]
    if "strong_open" in types and not "".join(parts[: types.index("strong_open")]):
        end = types.index("strong_close")
        parts = parts[end:] if "".join(parts[:end]).endswith(".") else parts
    return " ".join("".join(parts).split())


def main(files: list[str]) -> int:
    """Print a line for each page, then its faults; 1 if it has any."""
    names = files or ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
    pages = [read(name, (ROOT / name).read_text()) for name in names if name != "docs/log.md"]
    print(f"{'words':>5} {'commas':>6} {'longest':>7}  a sentence of")
    for page in pages:
        print(f"{page.mean_words:5.1f} {page.mean_commas:6.2f} {page.longest.words:7}  {page.name}")
    faults = [fault for page in pages for fault in page.faults()]
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
