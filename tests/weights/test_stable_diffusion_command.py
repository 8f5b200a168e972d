"""Stable Diffusion as it is published becomes a weights folder by the command, and stage 1 starts from that."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.pairs import write_pairs
from tests.tiny_runs import overrides
from tests.weights.published import compvis_whole, expected_start, write_diffusers
from tests.weights.small import same
from vdtrain.cli import main
from vdtrain.weights.folder import open_weights_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from forks import Case, run_cases


def imported(source: Path, output: Path) -> int:
    return main(["weights", "import", "stable_diffusion", str(source), "model=tiny", f"output={output}"])


def ckpt(folder: Path) -> Path:
    torch.save({"state_dict": compvis_whole(), "global_step": 470000, "epoch": 1}, folder / "sd-v1-4.ckpt")
    return folder / "sd-v1-4.ckpt"


def legacy_ckpt(folder: Path) -> Path:
    file = folder / "sd-v1-4.ckpt"
    torch.save({"state_dict": compvis_whole()}, file, _use_new_zipfile_serialization=False)
    return file


def safetensors(folder: Path) -> Path:
    save_file(compvis_whole(), folder / "v1-5-pruned.safetensors")
    return folder / "v1-5-pruned.safetensors"


def diffusers(folder: Path) -> Path:
    return write_diffusers(folder / "stable-diffusion-v1-4")


def diffusers_bin(folder: Path) -> Path:
    return write_diffusers(folder / "stable-diffusion-v1-4", file="diffusion_pytorch_model.bin")


LAYOUTS = [ckpt, legacy_ckpt, safetensors, diffusers, diffusers_bin]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_imported(tmp_path: Path, layout: Callable[[Path], Path], capsys) -> None:
    assert imported(layout(tmp_path), tmp_path / "sd") == 0
    assert same(open_weights_folder(tmp_path / "sd"), expected_start())
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{tmp_path / 'sd'}  (")
    assert shown.err == ""


def test_stage_1_starts_from_it(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    assert imported(ckpt(tmp_path), tmp_path / "sd") == 0
    arguments = ["stage=stage1_single_flow", *overrides(tmp_path), f"stage.init_from={tmp_path / 'sd'}"]
    (ending,) = run_cases(tmp_path / "cases", [Case(1, arguments)])
    assert ending.statuses == [0], ending.logs
    assert f"starts from {tmp_path / 'sd'}" in ending.logs[0]
