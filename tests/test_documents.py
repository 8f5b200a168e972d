"""Links of the documents lead somewhere, and every command explains itself. Their commands: tests/documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents.commands import PAGES, ROOT
from vdtrain.cli import COMMANDS
from vdtrain.cli import main as vdtrain_main

LINKS = {(ROOT / page, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())}


@pytest.mark.parametrize(("page", "link"), sorted(LINKS))
def test_links_lead_somewhere(page: Path, link: str) -> None:
    assert link.startswith("https://") or (page.parent / link).exists()


def test_helps_of_commands_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert vdtrain_main(["--help"]) == 0
    assert "train one stage" in capsys.readouterr().out
    assert vdtrain_main(["trian"]) == 2
    assert "'trian' is no command" in capsys.readouterr().err
    for command in COMMANDS:
        assert vdtrain_main([command, "--help"]) == 0
        assert f"Usage: vdtrain {command}" in capsys.readouterr().out
