"""Dockerfile and apptainer.def: linted, alike, and built where the tools and the internet are there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEFINITION = (ROOT / "apptainer.def").read_text()


def section(name: str) -> str:
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION, re.DOTALL | re.MULTILINE)
    assert found is not None, name
    return found[1]


def run(*words: str, text: str | None = None) -> str:
    done = subprocess.run(words, input=text, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def works(*words: str) -> bool:
    if shutil.which(words[0]) is None:
        return False
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_the_dockerfile_is_clean() -> None:
    assert run("hadolint", "Dockerfile") == ""


def test_the_definition_is_clean_and_its_files_are_there() -> None:
    run("shellcheck", "--shell=sh", "-", text=section("post"))
    run("shellcheck", "--shell=sh", "-", text=section("runscript"))
    for line in section("files").split("\n"):
        assert not line or (ROOT / line.split()[0]).exists(), line


def test_both_install_alike() -> None:
    images = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE), re.findall(r"^From: (\S+)", DEFINITION, re.MULTILINE)
    assert images[0] == images[1]
    for line in re.findall(r"(uv sync [^\n]*|uv==\S+|apt-get install [^\\\n]*)", section("post")):
        assert line.strip() in DOCKERFILE, line


@pytest.mark.slow
@pytest.mark.skipif(not works("docker", "info"), reason="no Docker daemon runs here")
def test_docker_builds_an_image_that_has_the_command() -> None:
    run("docker", "build", "--quiet", "--tag", "vdtrain-test", ".")
    assert "Usage: vdtrain" in run("docker", "run", "--rm", "vdtrain-test")


@pytest.mark.slow
@pytest.mark.skipif(not works("apptainer", "version"), reason="Apptainer is not installed here")
def test_apptainer_builds_an_image_that_has_the_command(tmp_path: Path) -> None:
    image = str(tmp_path / "vdtrain.sif")
    run("apptainer", "build", image, "apptainer.def")
    assert "Usage: vdtrain" in run("apptainer", "exec", image, "vdtrain", "--help")
