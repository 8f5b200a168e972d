"""Links of the documents lead somewhere, and every command explains itself. Their commands: tests/documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents.commands import PAGES, ROOT
from vdtrain.cli import COMMANDS
from vdtrain.cli import main as vdtrain_main

LINKED = (*PAGES, "CHANGELOG.md", "SECURITY.md")
TEXTS = {ROOT / page: (ROOT / page).read_text() for page in LINKED}
# The log and the changelog keep the names of their day.
PRESENT = {page: text for page, text in TEXTS.items() if page.name not in ("log.md", "CHANGELOG.md")}
LINKS = {(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\(([^)]+)\)", text)}
ROOMS = "vdtrain|data_pipeline|miniature|benchmarks|examples|slurm|tests"
FILES = {
    (page, file)
    for page, text in PRESENT.items()
    for file in re.findall(rf"(?<![\w/])(?:{ROOMS})(?:/\w+)+\.(?:py|sh|json)\b", text)
}
# What a page names as vdtrain.data.batch.BatchStream, or as `BatchStream` in a linked file.
NAMES = {
    (page, module.replace(".", "/"), name)
    for page, text in PRESENT.items()
    for module, name in re.findall(rf"(?<![\w./])((?:{ROOMS})(?:\.\w+)*)\.(?!md\b)(\w+)", text)
} | {
    (page, str((page.parent / file).resolve().relative_to(ROOT)).removesuffix(".py"), name)
    for page, text in PRESENT.items()
    for name, file in re.findall(r"`(\w+)`\s+in\s+\[[\w.]+\]\(([\w./]+\.py)\)", text)
}


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "link"), sorted(LINKS))
def test_links_lead_somewhere(page: Path, link: str) -> None:
    if link.startswith("https://"):
        return
    file, _, heading = link.partition("#")
    target = page.parent / file if file else page
    assert target.exists()
    assert not heading or heading in anchors(target.read_text())


@pytest.mark.parametrize(("page", "file"), sorted(FILES))
def test_files_that_a_page_names_exist(page: Path, file: str) -> None:
    assert (ROOT / file).is_file()


@pytest.mark.parametrize(("page", "module", "name"), sorted(NAMES))
def test_modules_hold_what_a_page_looks_for_in_them(page: Path, module: str, name: str) -> None:
    if (ROOT / module / name).is_dir() or (ROOT / module / f"{name}.py").is_file():
        return
    source = (ROOT / f"{module}.py").read_text()
    assert re.search(rf"^(?:class|def) {name}\b|^{name}\b.*=", source, re.MULTILINE)


def test_the_pages_name_files_and_what_is_in_them() -> None:
    assert len(FILES) >= 20
    assert {name for _, _, name in NAMES} >= {"BatchStream", "PairStream", "ContextLayers", "VAE"}


def test_helps_of_commands_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert vdtrain_main(["--help"]) == 0
    assert "train one stage" in capsys.readouterr().out
    assert vdtrain_main(["trian"]) == 2
    assert "unknown command 'trian'; choose from train" in capsys.readouterr().err
    for command in COMMANDS:
        assert vdtrain_main([command, "--help"]) == 0
        assert f"Usage: vdtrain {command}" in capsys.readouterr().out
