"""Every command that the documents and the demo show is one that the program takes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from data_pipeline.__main__ import main as data_pipeline_main
from vdtrain.cli import VERBS
from vdtrain.cli import main as vdtrain_main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / page
        for page in ("settings.md", "weights.md", "modalities.md", "evaluation.md", "data.md", "budget.md", "slurm.md")
    ),
]
LINKS = {(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())}


def commands() -> list[str]:
    """Command lines in the documents, in the demo and in the help of the verbs, joined at backslashes."""
    pages = [text for page in PAGES for text in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)]
    scripts = [(ROOT / "examples" / name).read_text() for name in ("demo.sh", "gallery.sh")]
    helps = [importlib.import_module(module).USAGE for module, _ in VERBS.values()]
    lines = re.sub(r"\\\n\s*", " ", "\n".join((*pages, *scripts, *helps))).splitlines()
    shown = (line.strip().split("  #")[0].removesuffix(" &") for line in lines)
    starts = ("vdtrain ", "python -m data_pipeline ", "torchrun ")
    return sorted({line for line in shown if line.startswith(starts) and "..." not in line and "VERB" not in line})


def run(command: str) -> int:
    settings = re.search(r'settings="(.*)"', (ROOT / "examples" / "gallery.sh").read_text())
    assert settings is not None
    command = command.replace("$settings", settings[1]).replace('"$@"', "")
    # What else a script fills in stands for a number or a part of a path.
    words = shlex.split(re.sub(r"\$(\w+|\{\w+\})", "1", command))
    if words[0] == "torchrun" and "data_pipeline" in words:
        return data_pipeline_main([*words[words.index("data_pipeline") + 1 :], "--cfg", "job"])
    if words[0] == "torchrun":
        return vdtrain_main(["train", *words[words.index("vdtrain.train") + 1 :], "--cfg", "job"])
    if words[0] == "vdtrain":
        return vdtrain_main([words[1], "--cfg", "job", *words[2:]])
    return data_pipeline_main([*words[3:], "--cfg", "job"])


def test_the_documents_show_commands() -> None:
    assert len(commands()) >= 12


@pytest.mark.parametrize("command", commands())
def test_command_is_one_that_works(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--help" in command:
        pytest.fail("commands that only print help need no test here")
    assert run(command) == 0, capsys.readouterr().err


@pytest.mark.parametrize(("page", "link"), sorted(LINKS))
def test_links_lead_somewhere(page: Path, link: str) -> None:
    assert link.startswith("https://") or (page.parent / link).exists()


def test_verbs_help_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert vdtrain_main(["--help"]) == 0
    assert "train one stage" in capsys.readouterr().out
    assert vdtrain_main(["trian"]) == 2
    assert "'trian' is no verb" in capsys.readouterr().err
    for verb in VERBS:
        assert vdtrain_main([verb, "--help"]) == 0
        assert f"Usage: vdtrain {verb}" in capsys.readouterr().out
