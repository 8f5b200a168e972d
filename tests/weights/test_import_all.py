"""`vdtrain weights import all`: every part by its own import, from given paths; what is there is left as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.weights.published import expected_start, write_diffusers
from tests.weights.small import same
from tests.weights.test_frozen_sources import check, clip, compvis, image_vae, optimus
from tests.weights.test_frozen_sources import settings as places
from vdtrain.cli import main
from vdtrain.models.frozen_weights import ASSETS
from vdtrain.weights.folder import open_weights_folder
from vdtrain.weights.imports import ADDRESSES

TOKENIZERS = {"bert_tokenizer": "encoder_tokenizer", "gpt2_tokenizer": "decoder_tokenizer"}
SOURCES = ("image_vae", "text_vae", "clip", *TOKENIZERS, "stable_diffusion")


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """What a person fetched elsewhere: files and folders, under the names that they have there."""
    folder = tmp_path / "downloads"
    write_diffusers(folder / "stable-diffusion-v1-4")
    for name, content in (("kl-f8.pth", compvis(image_vae())), ("optimus-vae.pth", optimus()), ("clip.bin", clip())):
        torch.save(content, folder / name)
    for source, asset in TOKENIZERS.items():
        (folder / source).mkdir()
        shutil.copy(ASSETS / "tiny" / f"{asset}.json", folder / source / "tokenizer.json")
    (folder / "notes.md").write_text("mine")
    return folder


def settings(folder: Path) -> list[str]:
    return [
        *places(folder),
        *(f"model.modalities.text.vae.{argument}={folder / source}.json" for source, argument in TOKENIZERS.items()),
        f"model.base_weights={folder / 'start'}",
    ]


def test_all_come_from_one_folder_and_are_skipped_when_they_are_there(
    downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["weights", "import", "all", str(downloads), *settings(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 6
    assert all(f"{source}: from {downloads}/" in said.err for source in SOURCES)
    for name in ("image_vae", "text_vae", "clip"):
        check(name, tmp_path)
    assert same(open_weights_folder(tmp_path / "start"), expected_start())
    # An interruption: the same command makes what is missing, and says what is there.
    (tmp_path / "clip.safetensors").unlink()
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.count("(there already; overwrite=true makes it again)") == 5
    assert said.err == f"clip: from {downloads}/clip.bin\n"
    check("clip", tmp_path)
    assert main([*words, "overwrite=true"]) == 0
    assert "there already" not in capsys.readouterr().out


def test_a_part_that_fails_keeps_no_other_back(
    downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ADDRESSES, "text_vae", str(tmp_path / "nowhere.pth"))
    (downloads / "optimus-vae.pth").rename(tmp_path / "optimus.pth")
    words = ["weights", "import", "all", str(downloads), *settings(tmp_path)]
    assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: import all: 1 of 6 failed, and the same command tries them again; text_vae: path=")
    check("clip", tmp_path)
    assert main([*words, f"text_vae:{tmp_path / 'optimus.pth'}"]) == 0
    check("text_vae", tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["clp:{downloads}/clip.bin"], "write SOURCE:PATH; did you mean clip?"),
        (["clip:{downloads}/gone.bin"], "gone.bin: no such file or folder"),
        (["gone"], "gone: no such file or folder; write SOURCE:PATH with one of image_vae"),
        (["{downloads}/notes.md"], "is recognised there; write SOURCE:PATH"),
        (["{downloads}", "clip:{downloads}/clip.bin"], "clip is given twice"),
        (["output=x"], "output=x: every part goes where the model reads it"),
        (["{downloads}", "model.base_weights=/dev/null/x"], "stable_diffusion, /dev/null/x: cannot be written"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_read(
    downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    filled = [word.format(downloads=downloads) for word in words]
    assert main(["weights", "import", "all", *settings(tmp_path), *filled]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_model_without_imported_files_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "import", "all", "model=tiny"]) == 2
    assert "import all: model=tiny reads no imported file" in capsys.readouterr().err
