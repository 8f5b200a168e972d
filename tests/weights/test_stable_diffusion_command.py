"""Stable Diffusion as it is published becomes a weights folder by the command, and stage 1 starts from that."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.pairs import write_pairs
from tests.tiny_runs import overrides
from tests.training.forks import Case, run_cases
from tests.weights.published import compvis_unet, compvis_whole, diffusers_unet, expected_start, write_diffusers
from tests.weights.small import same
from tests.weights.test_frozen_sources import clip, compvis, image_vae
from tests.weights.test_torch_reading import packages, training_state
from vdtrain.cli import main
from vdtrain.weights.folder import open_weights_folder
from vdtrain.weights.published.layouts import ema_name
from vdtrain.weights.published.stable_diffusion import UNET_PREFIX


def imported(source: Path, output: Path) -> int:
    return main(["weights", "import", "stable_diffusion", str(source), "model=tiny", f"output={output}"])


def ckpt(folder: Path) -> Path:
    """As published in August 2022: callbacks under Lightning's class, rates as NumPy's numbers."""
    with packages("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint") as (callback,):
        content = {"state_dict": compvis_whole(), "callbacks": {callback: {"best": torch.ones(1)}}, **training_state()}
        torch.save({**content, "global_step": 470000, "epoch": 1}, folder / "sd-v1-4.ckpt")
    return folder / "sd-v1-4.ckpt"


def legacy_ckpt(folder: Path) -> Path:
    file = folder / "sd-v1-4.ckpt"
    torch.save({"state_dict": compvis_whole()}, file, _use_new_zipfile_serialization=False)
    return file


def wrapped(folder: Path) -> Path:
    """Of a parallel, compiled model, by DeepSpeed."""
    state = {f"module._orig_mod.{key}": tensor for key, tensor in compvis_whole().items()}
    torch.save({"module": state, "global_steps": 3}, folder / "mp_rank_00_model_states.pt")
    return folder / "mp_rank_00_model_states.pt"


def safetensors(folder: Path) -> Path:
    save_file(compvis_whole(), folder / "v1-5-pruned.safetensors", {"format": "pt", "modelspec.prediction_type": "eps"})
    return folder / "v1-5-pruned.safetensors"


def averaged_alone(folder: Path) -> Path:
    save_file({ema_name(key): tensor for key, tensor in compvis_unet().items()}, folder / "ema.safetensors")
    return folder / "ema.safetensors"


def unet_alone(folder: Path) -> Path:
    state = {key.removeprefix(UNET_PREFIX): tensor for key, tensor in compvis_unet().items()}
    torch.save(state, folder / "unet.pt")
    return folder / "unet.pt"


def diffusers(folder: Path) -> Path:
    return write_diffusers(folder / "stable-diffusion-v1-4")


def diffusers_bin(folder: Path) -> Path:
    return write_diffusers(folder / "stable-diffusion-v1-4", file="diffusion_pytorch_model.bin")


def diffusers_unet_folder(folder: Path) -> Path:
    return diffusers(folder) / "unet"


def diffusers_file(folder: Path) -> Path:
    return diffusers(folder) / "unet" / "diffusion_pytorch_model.safetensors"


def heads_by_level(folder: Path) -> Path:
    made = diffusers(folder)
    change(made / "unet" / "config.json", attention_head_dim=[4, 4])
    return made


def beside_variants(folder: Path) -> Path:
    """The plain weights among all that the repositories have."""
    made = diffusers(folder)
    other = {key: torch.ones(1) for key in diffusers_unet()}
    for name in ("fp16", "non_ema"):
        save_file(other, made / "unet" / f"diffusion_pytorch_model.{name}.safetensors")
        torch.save(other, made / "unet" / f"diffusion_pytorch_model.{name}.bin")
    torch.save(other, made / "unet" / "diffusion_pytorch_model.bin")
    shards(made / "unet", "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors", "safetensors.index.fp16", other)
    return made


def hub_snapshot(folder: Path) -> Path:
    """The client's cache: links to files that are named by their contents."""
    made, blobs = diffusers(folder), folder / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in made.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    return made


LAYOUTS = [
    ckpt,
    legacy_ckpt,
    wrapped,
    safetensors,
    averaged_alone,
    unet_alone,
    diffusers,
    diffusers_bin,
    diffusers_unet_folder,
    diffusers_file,
    heads_by_level,
    beside_variants,
    hub_snapshot,
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_imported(tmp_path: Path, layout: Callable[[Path], Path], capsys) -> None:
    assert imported(layout(tmp_path), tmp_path / "sd") == 0
    assert same(open_weights_folder(tmp_path / "sd"), expected_start())
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{tmp_path / 'sd'}  (")
    assert shown.err == ""


def shards(unet: Path, pattern: str, index: str, tensors: dict[str, Tensor]) -> None:
    places = {key: pattern.format(1 + number % 2) for number, key in enumerate(tensors)}
    for file in set(places.values()):
        part = {key: tensor for key, tensor in tensors.items() if places[key] == file}
        save_file(part, unet / file) if file.endswith(".safetensors") else torch.save(part, unet / file)
    (unet / f"diffusion_pytorch_model.{index}.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize(
    ("pattern", "index"),
    [
        ("diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors", "safetensors.index.fp16"),
        ("diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors", "fp16.safetensors.index"),
        ("diffusion_pytorch_model-0000{}-of-00002.fp16.bin", "bin.index.fp16"),
        ("diffusion_pytorch_model-0000{}-of-00002.safetensors", "safetensors.index"),
        (None, None),
    ],
)
def test_half_precision_in_one_file_or_in_parts(tmp_path: Path, pattern: str | None, index: str | None) -> None:
    single = "diffusion_pytorch_model.fp16.safetensors"
    made = write_diffusers(tmp_path / "sd15", torch.float16, single)
    if pattern and index:
        (made / "unet" / single).unlink()
        shards(made / "unet", pattern, index, diffusers_unet(torch.float16))
    assert imported(made, tmp_path / "sd") == 0
    assert same(open_weights_folder(tmp_path / "sd"), expected_start(torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precisions_of_everything_in_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    """Files that others made smaller have their schedule's buffers in the same precision."""
    state = {key: each.to(dtype) if each.is_floating_point() else each for key, each in compvis_whole().items()}
    save_file(state, tmp_path / "pruned.safetensors")
    assert imported(tmp_path / "pruned.safetensors", tmp_path / "sd") == 0
    assert same(open_weights_folder(tmp_path / "sd"), expected_start(dtype))


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def scheduler(**changes: Any) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        pipeline = diffusers(folder)
        change(pipeline / "scheduler" / "scheduler_config.json", **changes)
        return pipeline

    return made


def unet_config(**changes: Any) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        pipeline = diffusers(folder)
        change(pipeline / "unet" / "config.json", **changes)
        return pipeline

    return made


def altered(notes: dict[str, str] | None = None, **changes: Tensor) -> Callable[[Path], Path]:
    """CompVis' file with other tensors, named by the ends of their keys, or with new ones."""

    def made(folder: Path) -> Path:
        state = compvis_whole()
        for end, tensor in changes.items():
            name = end.replace("__", ".")
            state[next((key for key in state if key.endswith(name)), name)] = tensor
        save_file(state, folder / "sd.safetensors", notes)
        return folder / "sd.safetensors"

    return made


def with_recipe(folder: Path) -> Path:
    (folder / "sd.yaml").write_text('model:\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n')
    return altered()(folder)


def with_value(value: float) -> Callable[[Path], Path]:
    bias = compvis_unet()[UNET_PREFIX + "out.2.bias"].clone()
    bias[1] = value
    return altered(out__2__bias=bias)


BETAS = torch.linspace(0.0001, 0.02, 1000)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            scheduler(prediction_type="v_prediction"),
            "prediction_type is v_prediction in scheduler/scheduler_config.json",
        ),
        (scheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr is True in scheduler"),
        (scheduler(beta_schedule="linear"), "beta_schedule is linear in scheduler"),
        (
            scheduler(beta_end=0.02),
            "beta_end is 0.02 in scheduler.*, and the model has 0.012; .* or set model.schedule",
        ),
        (scheduler(num_train_timesteps=2000), "num_train_timesteps is 2000 in scheduler"),
        (scheduler(trained_betas=[0.1]), "trained_betas is "),
        (altered(v_pred=torch.empty(0)), "v_pred shows that the network predicts velocity"),
        (
            altered(ztsnr=torch.empty(0)),
            "ztsnr shows that the network was trained on a noise schedule that ends in pure noise",
        ),
        (altered(betas=BETAS), "betas does not match ScheduleConfig.*set model.schedule"),
        (
            altered({"modelspec.prediction_type": "v"}),
            "modelspec.prediction_type=v shows that the network predicts velocity",
        ),
        (with_recipe, "sd.yaml shows that the network predicts velocity"),
        (
            unet_config(attention_head_dim=[5, 10]),
            r"attention_head_dim is \[5, 10\] in config.json, and the model has 4",
        ),
        (unet_config(num_attention_heads=8), "num_attention_heads is 8 in config.json"),
        (unet_config(flip_sin_to_cos=False), "flip_sin_to_cos is False in config.json"),
        (
            altered(input_blocks__0__0__weight=torch.zeros(64, 9, 3, 3)),
            "it is a network for inpainting, with 9 input channels; give the plain one: ",
        ),
        (
            altered(input_blocks__1__1__transformer_blocks__0__attn2__to_k__weight=torch.zeros(64, 1024)),
            "it is Stable Diffusion 2, with contexts 1024 wide; give version 1: ",
        ),
        (altered(**{f"{UNET_PREFIX}label_emb.0.0.weight": torch.zeros(1)}), "it is Stable Diffusion XL"),
        (with_value(float("nan")), "out.2.bias holds values that are NaN or infinite"),
        (with_value(float("inf")), "out.2.bias holds values that are NaN or infinite"),
        (with_value(float("-inf")), "out.2.bias holds values that are NaN or infinite"),
        (
            lambda folder: saved(folder, compvis(image_vae())),
            "no keys below model.diffusion_model.*holds the image VAE",
        ),
        (lambda folder: saved(folder, clip()), "no keys below model.diffusion_model.*it holds CLIP by open_clip"),
        (lambda folder: saved(folder, {"x.y": torch.ones(1)}), "no keys below .*it holds 1 tensors such as x.y"),
        (
            lambda folder: saved(folder, {"control_model.input_blocks.0.0.weight": torch.ones(1)}),
            "it holds 1 tensors such as control_model.input_blocks.0.0.weight",
        ),
        (
            lambda folder: saved(folder, {"model.diffusion_model.joint_blocks.0.weight": torch.ones(1)}),
            "it holds 1 tensors such as model.diffusion_model.joint_blocks.0.weight",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, made: Callable[[Path], Path], message: str, capsys) -> None:
    source = made(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert imported(source, tmp_path / "sd") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith(f"error: path={tmp_path}")
    assert re.search(message, shown.err), shown.err
    assert sorted(tmp_path.rglob("*")) == before


def saved(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "other.pth")
    return folder / "other.pth"


@pytest.mark.parametrize("name", ["sd.pth", "sd.ckpt", "sd.safetensors", "sd.pt", "sd.bin"])
def test_a_folder_does_not_get_the_name_of_a_file(tmp_path: Path, name: str, capsys) -> None:
    assert imported(safetensors(tmp_path), tmp_path / name) == 2
    error = capsys.readouterr().err
    assert f"output={tmp_path / name}: the result is a weights folder, not a file; leave out " in error
    assert not (tmp_path / name).exists()


def test_stage_1_starts_from_each(tmp_path: Path) -> None:
    """CompVis' checkpoint, one file of safetensors, a folder of diffusers, and one in half precision."""
    write_pairs(tmp_path / "data")
    forms = [ckpt, safetensors, diffusers, half_folder]
    cases = []
    for form in forms:
        made, folder = tmp_path / form.__name__, tmp_path / f"{form.__name__}_imported"
        made.mkdir()
        assert imported(form(made), folder) == 0
        arguments = ["stage=stage1_single_flow", *overrides(tmp_path), f"stage.init_from={folder}"]
        arguments += ["stage.phases=[{resolution:32,samples:4}]", f"run_dir={tmp_path / 'runs' / form.__name__}"]
        cases.append(Case(1, arguments))
    endings = run_cases(tmp_path / "cases", cases)
    losses = []
    for form, ending in zip(forms, endings, strict=True):
        assert ending.statuses == [0], ending.logs
        assert f"starts from {tmp_path / form.__name__}_imported" in ending.logs[0]
        (record,) = (tmp_path / "runs" / form.__name__ / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(record)["loss"])
    assert losses[0] == losses[1] == losses[2]
    assert losses[3] == pytest.approx(losses[0], rel=1e-2)


def half_folder(folder: Path) -> Path:
    return write_diffusers(folder / "sd15", torch.float16, "diffusion_pytorch_model.fp16.safetensors")
