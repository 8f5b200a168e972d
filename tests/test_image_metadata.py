"""No image or caption file that a command writes tells a path of the machine that made it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.weights.small import MODEL, weights
from vdtrain.cli import main
from vdtrain.weights.folder import write_weights_folder

QUICK = ("resolution=32", "steps=1", "threads=1", "device=cpu", "precision=fp32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an image and a mask, all of which are named by their whole paths."""
    folder = tmp_path_factory.mktemp("home-of-someone")
    write_weights_folder(folder / "model", weights(), MODEL)
    Image.new("RGB", (32, 32), "red").save(folder / "given.png")
    Image.new("L", (32, 32), 255).save(folder / "mask.png")
    return folder


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sample", ["{0}/given.png", "flow=image-to-image"]),
        ("sample", ["a circle", "start_from=[{0}/given.png]", "fidelity=0.5"]),
        ("sample", ["{0}/given.png", "flow=image-to-text"]),
        ("blend", ["contexts=[{{image: {0}/given.png, mask: {0}/mask.png}}, {{text: a circle}}]"]),
        ("edit", ["{0}/given.png", "add=blue", "remove=red"]),
    ],
)
def test_metadata_has_names_and_no_absolute_paths(place: Path, tmp_path: Path, command: str, words: list[str]) -> None:
    typed = [command, str(place / "model"), *(word.format(place) for word in words)]
    assert main([*typed, *QUICK, f"output_dir={tmp_path}/out"]) == 0
    written = list((tmp_path / "out").iterdir())
    assert written
    for file in written:
        assert b"home-of-someone" not in file.read_bytes(), file.name
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    if (tmp_path / "out" / "0000.png").exists():
        with Image.open(tmp_path / "out" / "0000.png") as image:
            text = image.info["vdtrain"]
        assert '"checkpoint": "model"' in text
        assert "given.png" in text or "a circle" in text
