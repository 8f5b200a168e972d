"""Sentences are found and counted as a reader would, and pages that are hard to read are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.prose import WORDS, Page, Sentence, main, read

TEXT = """\
# A heading, with commas, is not prose

One fact at an interval. Two facts, in a longer sentence; that is all!

A [link, or two](https://example.org/a,b), `code, with commas`, e.g. 1,000 and 1.5 of *it*.
It goes on (in a bracket.) And ends

* a bullet
* two: bullets.
  The second one goes on:

  ```sh
  a block, of code. And more.
  ```

| a table, | with words. |
|---|---|
| and, | cells. |

**A heading in front.** Its paragraph.

**Not a heading**, but a sentence.

![A picture, described](image.png)
"""
SENTENCES = [
    (3, "One fact at an interval.", 5, 0),
    (3, "Two facts, in a longer sentence; that is all!", 9, 2),
    (5, "A link, or two, X, e.g. 1,000 and 1.5 of it.", 11, 3),
    (5, "It goes on (in a bracket.)", 6, 0),
    (5, "And ends", 2, 0),
    (8, "a bullet", 2, 0),
    (9, "two: bullets.", 2, 0),
    (9, "The second one goes on:", 5, 0),
    (20, "Its paragraph.", 2, 0),
    (22, "Not a heading, but a sentence.", 6, 1),
]


def test_sentences_of_a_page() -> None:
    page = read("page", TEXT)
    assert [(found.line, found.text, found.words, found.commas) for found in page.sentences] == SENTENCES
    assert page.mean_words == pytest.approx(sum(words for _, _, words, _ in SENTENCES) / len(SENTENCES))
    assert page.mean_commas == pytest.approx(sum(commas for _, _, _, commas in SENTENCES) / len(SENTENCES))
    assert page.longest.line == 5
    assert list(page.faults()) == []


def of(*texts: str) -> Page:
    return Page("page", tuple(Sentence(line, text) for line, text in enumerate(texts, start=1)))


def test_limits() -> None:
    at_the_limit = "word " * WORDS
    assert list(of(at_the_limit, "Short.").faults()) == []
    (fault,) = of("Short.", at_the_limit + "more").faults()
    assert fault.startswith(f"page:2: a sentence of {WORDS + 1} words, at most {WORDS}: word word")
    (fault,) = of("word " * 22, "word " * 24).faults()
    assert fault == "page: 23.0 words a sentence, at most 22; split sentences"
    (fault,) = of("one, two; three, four").faults()
    assert fault == "page: 3.0 commas a sentence, at most 1.8; split sentences"


def test_a_page_that_is_hard_to_read_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = tmp_path / "short.md", tmp_path / "long.md"
    short.write_text("One fact.\n")
    long.write_text("word, " * 50 + "\n")
    assert main([str(short)]) == 0
    assert main([str(short), str(long)]) == 1
    printed = capsys.readouterr()
    assert f" 50.0  50.00      50  {long}\n" in printed.out
    assert len(printed.err.splitlines()) == 3


def test_the_log_is_left_out_and_the_other_pages_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "  README.md\n" in printed
    assert "  docs/data.md\n" in printed
    assert "docs/log.md" not in printed
