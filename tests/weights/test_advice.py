"""A released file in place of imported weights: the error has the command for that file, and the command works."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_runs import overrides
from tests.weights.layout_2022 import to_2022
from tests.weights.published import compvis_whole, diffusers_unet, write_diffusers
from tests.weights.small import MODEL, PLAN, weights
from tests.weights.test_frozen_sources import clip, compvis, image_vae, optimus
from vdtrain.cli import main
from vdtrain.data.manifest import SHARDS_FILE
from vdtrain.weights.folder import is_weights_folder, write_weights_folder
from vdtrain.weights.published.diffusers_folder import write_pipeline
from vdtrain.weights.published.versatile_diffusion import to_released


def vd_2023(folder: Path) -> Path:
    torch.save({to_released(name): tensor for name, tensor in weights().items()}, folder / "vd-four-flow-v1-0.pth")
    return folder / "vd-four-flow-v1-0.pth"


def vd_2022(folder: Path) -> Path:
    parts = {"autokl.": compvis(image_vae()), "optimus.": optimus()}
    state = {to_2022(PLAN, name): tensor for name, tensor in weights().items()}
    state |= {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}
    torch.save({"state_dict": state}, folder / "vd-official.pth")
    return folder / "vd-official.pth"


def stable_diffusion(folder: Path) -> Path:
    torch.save({"state_dict": compvis_whole()}, folder / "sd v1-4.ckpt")
    return folder / "sd v1-4.ckpt"


def pipeline(folder: Path) -> Path:
    write_pipeline(folder / "versatile-diffusion", weights(), MODEL)
    return folder / "versatile-diffusion"


def unet_file(folder: Path) -> Path:
    save_file(diffusers_unet(), folder / "diffusion_pytorch_model.safetensors")
    return folder / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("made", "source", "text"),
    [
        (vd_2023, "versatile_diffusion", "Versatile Diffusion (2023)"),
        (vd_2022, "versatile_diffusion", "Versatile Diffusion (2022)"),
        (stable_diffusion, "stable_diffusion", "Stable Diffusion's U-Net"),
        (pipeline, "diffusers", "a diffusers pipeline"),
        (lambda folder: write_diffusers(folder / "sd"), "stable_diffusion", "a diffusers pipeline"),
        (lambda folder: write_diffusers(folder / "sd") / "unet", "stable_diffusion", "U-Net by diffusers"),
        (unet_file, "stable_diffusion", "U-Net by diffusers"),
    ],
)
def test_the_command_is_for_that_file(
    made: Callable[[Path], Path], source: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    file = made(tmp_path)
    (tmp_path / "data" / "manifest").mkdir(parents=True)
    (tmp_path / "data" / "manifest" / SHARDS_FILE).touch()
    train = ["train", "stage=stage3_four_flow", *overrides(tmp_path), f"stage.init_from='{file}'"]
    assert main(train) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: stage.init_from={file}: holds ")
    assert text in error
    assert error.count("\n") == 1
    match = re.search(r"`vdtrain (.+)`; then give stage.init_from=(\S+)$", error)
    assert match is not None, error
    words = shlex.split(match[1])
    assert words[:3] == ["weights", "import", source]
    if source == "versatile_diffusion":
        # The frozen parts of the first release would replace the model's own.
        words += [f"{setting}={tmp_path / name}.safetensors" for name, setting in PLACES.items()]
    assert main(words) == 0
    assert is_weights_folder(Path(match[2]))
    # The same file again, for another model's sake: what is there already is not replaced.
    assert main(train) == 2
    assert f"then give stage.init_from=weights/{file.stem.replace(' ', '_')}\n" in capsys.readouterr().err


PLACES = {
    "image_vae": "model.modalities.image.vae.weights",
    "text_vae": "model.modalities.text.vae.weights",
}


@pytest.mark.parametrize("command", ["sample", "weights export safetensors out"])
def test_every_command_that_reads_weights_says_it(command: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    file = vd_2023(tmp_path)
    more = ["flow=text-to-image", "inputs=[a]", "output_dir=out"] if command == "sample" else []
    assert main([*command.split(), f"checkpoint={file}", *more]) == 2
    assert f"`vdtrain weights import versatile_diffusion {file}`" in capsys.readouterr().err


def test_what_holds_no_diffuser(tmp_path: Path, capsys) -> None:
    for name, content, message in (
        ("vae.pth", compvis(image_vae()), "holds the image VAE (`vdtrain weights import image_vae`), but no diffuser"),
        ("clip.pth", clip(), "holds CLIP by open_clip (`vdtrain weights import clip`), but no diffuser"),
        ("other.pth", {"a\x1b[31m": torch.ones(1)}, r"holds 1 tensors such as a\x1b[31m, but no diffuser"),
        ("list.pth", [1], "holds no tensors by name"),
    ):
        torch.save(content, tmp_path / name)
        assert main(["weights", "export", "safetensors", str(tmp_path / "out"), f"checkpoint={tmp_path / name}"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.rstrip("\n").isprintable()
    folder = tmp_path / "absent.ckpt"
    assert main(["weights", "export", "safetensors", str(tmp_path / "out"), f"checkpoint={folder}"]) == 2
    assert "no such file; import published weights first" in capsys.readouterr().err


def test_a_weights_folder_may_have_any_name(tmp_path: Path) -> None:
    write_weights_folder(tmp_path / "sd.ckpt", weights(), MODEL)
    assert main(["weights", "export", "safetensors", str(tmp_path / "out"), f"checkpoint={tmp_path / 'sd.ckpt'}"]) == 0


def test_what_is_not_there_yet_has_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, source in (("stable_diffusion_v1", "stable_diffusion"), ("versatile_diffusion", "versatile_diffusion")):
        assert main(["weights", "export", "safetensors", "out", f"checkpoint=weights/{folder}"]) == 2
        assert f"make it with `vdtrain weights import {source}`" in capsys.readouterr().err


def test_a_pipeline_of_another_source(tmp_path: Path, capsys) -> None:
    for made, right, wrong in (
        (pipeline(tmp_path), "diffusers", ("versatile_diffusion", "stable_diffusion")),
        (write_diffusers(tmp_path / "sd"), "stable_diffusion", ("diffusers", "versatile_diffusion")),
    ):
        for source in wrong:
            words = ["import", source, str(made), "model=tiny", f"output={tmp_path / 'out'}"]
            assert main(["weights", *words]) == 2
            error = capsys.readouterr().err
            assert f"path={made}: a diffusers pipeline for another source; `vdtrain weights import {right}`" in error
