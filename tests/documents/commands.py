"""The commands that README, docs, helps and scripts show, as a user would copy them."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
# What a command in the middle of a sentence begins with.
PROGRAMS = "vdtrain|python3?|torchrun|make|bash|sbatch|scontrol|scancel|uv|pip|apt-get|curl|mkdir|tail|slurm/\\S+\\.sh"
INLINE = re.compile(rf"(?:{PROGRAMS})(?: |$)")
NEEDS = re.compile(r"needs (?P<what>[^.;,()]+)")


@dataclass(frozen=True)
class Command:
    """What is typed, and where it stands.

    Attributes:
        page: a document, or the module whose help shows it.
        line: of the document, or number of the example in a help.
        language: sh or python.
        needs: what its mark says that it needs.
        inline: whether it stands in a sentence or a table.
    """

    page: str
    line: int
    text: str
    language: str = "sh"
    needs: str | None = None
    inline: bool = False

    @property
    def mention(self) -> bool:
        """Whether only a program or a command is named, or a form with gaps, and nothing is there to be typed."""
        named = rf"(?:{PROGRAMS})|vdtrain \w+(?: import| export| push)?|python -m [\w.]+(?: \w+)?"
        named += r"|scontrol [\w ]+|scancel"
        return self.inline and bool(
            re.fullmatch(named, self.text) or re.search(r"\.\.\.|\b[A-Z]{2,}\b(?!=)", self.text)
        )

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@cache
def of_page(page: str) -> tuple[Command, ...]:
    """Commands of a document, in its order."""
    return tuple(commands_in(page, (ROOT / page).read_text()))


def commands_in(page: str, text: str) -> Iterator[Command]:
    """Commands of a Markdown text."""
    yield from _found(page, MarkdownIt("commonmark").enable("table").parse(text))


def _found(page: str, tokens: list[Token]) -> Iterator[Command]:
    line = 0
    for token in tokens:
        line = token.map[0] + 1 if token.map else line
        if token.type == "fence" and token.info == "sh":
            yield from (Command(page, line + number, *rest) for number, *rest in _lines(token.content, "sh"))
        elif token.type == "fence" and token.info == "python":
            yield Command(page, line, token.content, "python")
        elif token.type in ("fence", "code_block"):
            shown = [text for text in token.content.splitlines() if INLINE.match(text.strip())]
            assert not shown, f"{page}:{line}: {shown[0]}: a command stands in a block of its own, ```sh"
        elif token.type == "inline":
            yield from _in_a_sentence(page, line, token.children or [])


def _lines(block: str, language: str) -> Iterator[tuple[int, str, str, str | None]]:
    """Commands of a block: as many lines as make a whole one, a loop for example."""
    first, waiting = 0, ""
    for number, line in enumerate(block.splitlines(), 1):
        first, waiting = (first, f"{waiting}\n{line}") if waiting else (number, line)
        if line.endswith("\\") or subprocess.run(["bash", "-nc", waiting], capture_output=True).returncode:
            continue
        comment = re.search(r"(?:^|\s)#(.*)$", line)
        mark = NEEDS.search(comment[1]) if comment else None
        text = re.sub(r"(?:^|\s+)#.*$", "", waiting, flags=re.MULTILINE).strip()
        if text:
            yield first, text, language, mark["what"].strip() if mark else None
        waiting = ""
    assert not waiting, f"not a whole command: {waiting}"


def _in_a_sentence(page: str, line: int, tokens: list[Token]) -> Iterator[Command]:
    for number, token in enumerate(tokens):
        line += token.type == "softbreak"
        if token.type == "code_inline" and INLINE.match(token.content):
            after = "".join(other.content or " " for other in tokens[number + 1 : number + 4])
            mark = NEEDS.match(after.lstrip(" (,"))
            yield Command(page, line, token.content, "sh", mark["what"].strip() if mark else None, True)


@cache
def yaml_of_page(page: str) -> tuple[str, ...]:
    """Files of options that a document shows."""
    tokens = MarkdownIt("commonmark").parse((ROOT / page).read_text())
    return tuple(token.content for token in tokens if token.type == "fence" and token.info == "yaml")


def of_helps() -> list[Command]:
    """Examples that `--help` prints, of every command."""
    from vdtrain.cli import COMMANDS

    modules = ["data_pipeline.__main__", "data_pipeline.latents.latents", *(module for module, _ in COMMANDS.values())]
    return [
        Command(module, number, *rest)
        for module in modules
        for number, *rest in _lines(_examples(importlib.import_module(module).USAGE), "sh")
    ]


def _examples(usage: str) -> str:
    found = re.search(r"^Examples:\n((?:  .*\n)+)", usage, flags=re.MULTILINE)
    assert found is not None, usage
    return re.sub(r"^  ", "", found[1].replace("{{", "{").replace("}}", "}"), flags=re.MULTILINE)
