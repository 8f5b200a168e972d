"""The trained model and the images that the package brings, and the notebook that plays with them."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from miniature.detector import caption_attributes, detect
from tests.programs import program
from tests.tiny_runs import ROOT
from vdtrain.commands.blend import main as blend
from vdtrain.commands.edit import main as edit
from vdtrain.config.compose import ConfigError
from vdtrain.pipeline import VersatileDiffusion
from vdtrain.weights.folder import SHIPPED, located

QUICK = ["steps=25", "guidance_scale=3", "seed=3", "threads=1"]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def shown(file: Path) -> tuple[str | None, str | None]:
    """Colour and shape in an image file."""
    with Image.open(file) as image:
        return detect(np.asarray(image.convert("RGB")))


def typed(folder: Path, program: str, *words: str) -> str:
    """What a program of a shell prints in a folder."""
    done = subprocess.run([program, *words], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_picture_right_after_cloning(tmp_path: Path) -> None:
    installed = str(Path(sys.executable).parent / "vdtrain")
    assert "samples/0000.png" in typed(tmp_path, installed, "sample", "tiny", "a red circle")
    assert shown(tmp_path / "samples/0000.png") == ("red", "circle")
    with Image.open(tmp_path / "samples/0000.png") as image:
        assert image.size == (64, 64)


def test_a_caption_of_an_image_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()  # a folder of that name, which holds no checkpoint
    said = typed(tmp_path, program("vdtrain"), "sample", "tiny", "asset:images/star.png", "flow=image-to-text", *QUICK)
    (made,) = (tmp_path / "samples/captions.txt").read_text().splitlines()
    assert made in said
    assert caption_attributes(made) == ("blue", "star")


def test_blends_and_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    star = ROOT / "examples/images/star.png"
    settings = ["checkpoint=tiny", "resolution=64", *QUICK]
    assert blend([*settings, f"contexts=[{{text: a yellow square, weight: 10}}, {{image: {star}}}]"]) == 0
    assert shown(tmp_path / "samples/0000.png") == ("yellow", "square")
    assert edit([*settings, "output_dir=edited", str(star), "remove=a star", "add=a circle"]) == 0
    assert shown(tmp_path / "edited/0000.png")[1] == "circle"


def test_a_checkpoint_of_that_name_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert located("tiny") == SHIPPED["tiny"]
    Path("tiny/weights.json").write_text("{}")
    assert located("tiny") == Path("tiny")
    with pytest.raises(ConfigError, match="checkpoint=tiny: "):
        VersatileDiffusion.from_checkpoint("tiny")


def test_the_shipped_files_are_small_and_whole() -> None:
    files = {file.name for file in SHIPPED["tiny"].iterdir()}
    record = json.loads((SHIPPED["tiny"] / "weights.json").read_text())
    assert {"model.safetensors", "model.yaml"} <= record["files"].keys() == files - {"weights.json"}
    assert sum((SHIPPED["tiny"] / name).stat().st_size for name in files) < 10_000_000
    assert VersatileDiffusion.from_checkpoint("tiny").config.resolution == 64


@pytest.mark.slow
def test_the_notebook_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    stored, fresh = nbformat.read(NOTEBOOK, 4), nbformat.read(NOTEBOOK, 4)
    (tmp_path / "images").symlink_to(ROOT / "examples" / "images")
    NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = 0
    for before, after in zip(stored.cells, fresh.cells, strict=True):
        made = [output.data for output in after.get("outputs", []) if "data" in output]
        assert [each.keys() for each in made] == [
            output.data.keys() for output in before.get("outputs", []) if "data" in output
        ]
        for each in made:
            if "image/png" in each:
                image = Image.open(io.BytesIO(base64.b64decode(each["image/png"])))
                # Several times as large as the pictures themselves.
                assert min(image.size) > 192
                pictures += 1
    assert pictures >= 7
    text = NOTEBOOK.read_text()
    assert all(place not in text for place in (str(ROOT), "/home/", "/tmp/", "site-packages"))
    assert '"output_type": "error"' not in text
