"""docs/troubleshooting.md quotes the messages of the code, and the most important messages of the code are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
HEADINGS = re.findall(r"(?m)^### `(.+)`$", PAGE.read_text(encoding="utf-8"))
HOLE = "\0"
# Of these every message with a remedy is on the page: what ends runs on many machines, and what keeps them ended.
COVERED = {
    "vdtrain/run/connections.py": 7,
    "vdtrain/run/company.py": 2,
    "vdtrain/run/restarts.py": 3,
}


def template(node: ast.AST) -> str | None:
    """A text of the code with a hole for each value in it; None for other nodes."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or HOLE for part in node.values)
    return None


def texts(path: Path) -> Iterator[str]:
    """The texts of a file, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) not in alone | inside and (found := template(node)):
            yield found


@cache
def all_texts() -> list[str]:
    files = [*(ROOT / "vdtrain").rglob("*.py"), *(ROOT / "data_pipeline").rglob("*.py")]
    return [text for file in files for text in texts(file)]


def quotes(heading: str, text: str) -> bool:
    """Whether the fixed words of a heading are in a text of the code, in this order, with holes between them."""
    parts = [re.escape(part.strip()) for part in heading.split("...") if part.strip()]
    return re.search(r"[^\0]*\0.*".join(parts), re.sub("%[sdg]", HOLE, text), re.DOTALL) is not None


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_quoted_message_is_one_of_the_code(heading: str) -> None:
    assert any(quotes(heading, text) for text in all_texts())


@pytest.mark.parametrize("file", COVERED)
def test_the_messages_that_matter_most_are_on_the_page(file: str) -> None:
    messages = [text for text in texts(ROOT / file) if re.search(r"\w[^;]*; ?\w|; \0$", text) and HOLE in text]
    assert len(messages) >= COVERED[file]
    missing = [text.replace(HOLE, "...") for text in messages if not any(quotes(each, text) for each in HEADINGS)]
    assert missing == []


def test_the_page_has_its_size_and_no_entry_twice() -> None:
    assert 25 <= len(HEADINGS) == len(set(HEADINGS)) <= 60
    sections = PAGE.read_text(encoding="utf-8").split("\n### ")[1:]
    assert all(len(section.split("\n## ")[0].splitlines()) >= 3 for section in sections)


@pytest.mark.parametrize("other", ["another message", "lost the contact to ..., which ... ended", "is in use by"])
def test_a_message_that_the_code_does_not_have_is_found_out(other: str) -> None:
    assert any(quotes(other, text) for text in all_texts()) is (other == "is in use by")
