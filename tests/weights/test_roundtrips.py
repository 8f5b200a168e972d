"""Import, export and import again give the same bits in every layout, by the commands that a user types."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.weights.layout_2022 import to_2022
from tests.weights.small import MODEL, PLAN, same, weights
from vdtrain.cli import main
from vdtrain.config.schema import ScheduleConfig
from vdtrain.weights.folder import open_weights_folder, weights_folder_model, write_weights_folder
from vdtrain.weights.published.checks import schedule_buffers
from vdtrain.weights.published.diffusers_names import translated
from vdtrain.weights.published.versatile_diffusion import modules_2022, to_released
from vdtrain.weights.tensor_files import open_tensors

DTYPES = [torch.float32, torch.float16]


def run(*words: object) -> int:
    return main(["weights", *map(str, words), *([] if words[0] == "export" else ["model=tiny"])])


def imported(source: str, path: Path, output: Path) -> dict[str, Tensor]:
    assert run("import", source, path, f"output={output}") == 0
    assert weights_folder_model(output) == MODEL
    return dict(open_weights_folder(output))


def buffers(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in schedule_buffers(ScheduleConfig()).items()}


def release_2023(dtype: torch.dtype) -> dict[str, Tensor]:
    return {to_released(name): tensor for name, tensor in weights(dtype).items()}


def release_2022(dtype: torch.dtype) -> dict[str, Tensor]:
    return {to_2022(PLAN, name): tensor for name, tensor in weights(dtype).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("release", [release_2023, release_2022])
@pytest.mark.parametrize("extras", [False, True])
def test_a_release(tmp_path: Path, dtype: torch.dtype, release, extras: bool, capsys) -> None:
    content = release(dtype)
    if extras:
        content |= buffers(dtype) | {"logvar": torch.zeros(1000), "lvlb_weights": torch.zeros(1000)}
        content |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.diffuserweight": torch.ones(1)}
    torch.save(content, tmp_path / "vd.pth")
    assert same(imported("versatile_diffusion", tmp_path / "vd.pth", tmp_path / "first"), weights(dtype))
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'first'}  ({len(weights())} tensors, float")
    assert run("export", "versatile_diffusion", tmp_path / "out.pth", f"checkpoint={tmp_path / 'first'}") == 0
    assert same(torch.load(tmp_path / "out.pth", weights_only=True), release_2023(dtype))
    assert same(imported("versatile_diffusion", tmp_path / "out.pth", tmp_path / "second"), weights(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["safetensors", "diffusers"])
def test_a_folder(tmp_path: Path, dtype: torch.dtype, layout: str) -> None:
    write_weights_folder(tmp_path / "first", weights(dtype), MODEL)
    assert run("export", layout, tmp_path / "out", f"checkpoint={tmp_path / 'first'}") == 0
    assert same(imported(layout, tmp_path / "out", tmp_path / "second"), weights(dtype))


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("keep", None)])
def test_precision(tmp_path: Path, precision: str, dtype: torch.dtype | None) -> None:
    write_weights_folder(tmp_path / "first", weights(), MODEL)
    out = tmp_path / "out.pth"
    assert run("export", "versatile_diffusion", out, f"checkpoint={tmp_path / 'first'}", f"precision={precision}") == 0
    assert same(open_tensors(out, "path"), release_2023(dtype or torch.float32))


@pytest.mark.parametrize("release", [release_2023, release_2022])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.", "model."])
def test_a_prefix_of_all_names(tmp_path: Path, release, prefix: str) -> None:
    state = {prefix + key: tensor for key, tensor in (release(torch.float32) | buffers(torch.float32)).items()}
    torch.save({"net": state}, tmp_path / "vd.pth")
    assert same(imported("versatile_diffusion", tmp_path / "vd.pth", tmp_path / "out"), weights())


def test_a_pipeline_of_another_schedule_is_refused(tmp_path: Path, capsys) -> None:
    write_weights_folder(tmp_path / "w", weights(), MODEL)
    assert run("export", "diffusers", tmp_path / "vd", f"checkpoint={tmp_path / 'w'}") == 0
    file = tmp_path / "vd" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    assert run("import", "diffusers", tmp_path / "vd", f"output={tmp_path / 'out'}") == 2
    assert "prediction_type is v_prediction in scheduler/scheduler_config.json" in capsys.readouterr().err


def test_names_of_the_first_release() -> None:
    """Layers that have a module inside for images are plain linear ones for text."""
    names = {
        "global_layers.2.bias": "time_embed.2.bias",
        "data_layers.image.0.weight": "unet_image.input_blocks.0.0.weight",
        "data_layers.image.2.op.weight": "unet_image.input_blocks.2.0.op.weight",
        "data_layers.text.2.weight": "unet_text.input_blocks.2.0.weight",
        "context_layers.text.0.proj_in.weight": "unet_text.input_blocks.1.1.proj_in.weight",
        "context_layers.image.2.norm.weight": "unet_image.middle_block.1.norm.weight",
        "data_layers.text.11.2.bias": "unet_text.out.2.bias",
    }
    for name, key in names.items():
        assert name in weights()
        assert to_2022(PLAN, name) == f"model.diffusion_model.{key}"
    modules = modules_2022(PLAN, MODEL.modalities)
    assert all(translated(to_2022(PLAN, name), modules) == name for name in weights())
    assert translated("model.diffusion_model.unet_image.time_embed.0.weight", modules) is None
    assert translated("model.diffusion_model.input_blocks.0.0.weight", modules) is None


def without(content: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in content.items() if not any(part in key for part in parts)}


RELEASED = release_2023(torch.float32)
LAST = "diffuser.text.data_blocks.11.0.2.bias"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without(RELEASED, LAST), "weights of another model than model=tiny: missing data_layers.text.11.2.bias"),
        (without(RELEASED, "diffuser.text.data"), "missing data_layers.text.0.weight, .* and .* more"),
        (RELEASED | {LAST: torch.zeros(3)}, r"shape data_layers.text.11.2.bias \[3\] instead of \[64\]"),
        (RELEASED | {"diffuser.sound.data_blocks.0.0.weight": torch.ones(1)}, "unexpected data_layers.sound.0.weight"),
        (RELEASED | {"unet.weight": torch.ones(1)}, "unet.weight has no place in the model"),
        (RELEASED | {"betas": torch.linspace(1e-4, 0.02, 1000)}, "betas does not match .*set model.schedule"),
        (RELEASED | {"v_pred": torch.empty(0)}, r"v_pred shows that the network predicts velocity \(v-prediction\)"),
        (
            {f"net.{key}": each for key, each in (RELEASED | {"betas": torch.ones(10)}).items()},
            "net.betas does not match",
        ),
        (RELEASED | {"betas": torch.ones(10)}, "betas does not match"),
        (
            {"weight": torch.ones(1)},
            "no keys below model.diffusion_model.unet_image or diffuser.; it holds 1 tensors such as weight, not ",
        ),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, content: dict[str, Tensor], message: str, capsys) -> None:
    torch.save(content, tmp_path / "vd.pth")
    assert run("import", "versatile_diffusion", tmp_path / "vd.pth", f"output={tmp_path / 'out'}") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert re.search(message, shown.err), shown.err
    assert not (tmp_path / "out").exists()
