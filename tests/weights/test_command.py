"""`vdtrain weights export` of a checkpoint, and the mistakes that its command line can hold."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.weights.small import CARRIED, MODEL, same, weights, write_run
from vdtrain.checkpoint import format as form
from vdtrain.cli import main
from vdtrain.config.command_schema import WeightsConfig
from vdtrain.config.fields import look_up
from vdtrain.models.diffuser import layer_group
from vdtrain.training.start import open_weights
from vdtrain.weights.exports import PRECISIONS
from vdtrain.weights.folder import open_weights_folder, write_weights_folder
from vdtrain.weights.hub import ADDRESS, COMMIT
from vdtrain.weights.imports import ADDRESSES, FOLDERS, SOURCES
from vdtrain.weights.published.versatile_diffusion import to_released


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def averaged() -> dict[str, torch.Tensor]:
    return {
        name: tensor if layer_group(name) == CARRIED else weights(seed=1)[name] for name, tensor in weights().items()
    }


@pytest.mark.parametrize("which", ["ema", "model"])
def test_a_run_and_its_checkpoint_folder(run_folder: Path, tmp_path: Path, which: str) -> None:
    expected = averaged() if which == "ema" else weights()
    model, found = open_weights("checkpoint", str(run_folder), which)
    assert model.name == "tiny"
    assert same(found, expected)
    checkpoint = run_folder / "checkpoints" / "step-000000007"
    words = ["export", "safetensors", str(tmp_path / "out"), f"checkpoint={checkpoint}", f"weights={which}"]
    assert main(["weights", *words]) == 0
    assert same(open_weights_folder(tmp_path / "out"), expected)
    torch_file = tmp_path / "out.pth"
    words = ["export", "versatile_diffusion", str(torch_file), f"checkpoint={run_folder}", f"weights={which}"]
    assert main(["weights", *words, "precision=fp16"]) == 0
    assert same(
        torch.load(torch_file, weights_only=True),
        {to_released(name): tensor.half() for name, tensor in expected.items()},
    )


def test_a_damaged_checkpoint_gives_nothing(run_folder: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(run_folder / "checkpoints" / "step-000000007", copy)
    file = copy / form.shard_name(1, 2)
    file.write_bytes(file.read_bytes()[:-4])
    assert main(["weights", "export", "safetensors", str(tmp_path / "out"), f"checkpoint={copy}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: checkpoint={copy}: ")
    assert "truncated" in error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "choose import, export or push"),
        ("improt clip x", "weights improt: choose import, export or push"),
        ("import", "import : no such source; choose from versatile_diffusion"),
        ("import clpi x", "import clpi: no such source"),
        ("import safetensors", "import safetensors: takes one path, got 0"),
        ("import text_vae a b", "import text_vae: takes one path, got 2"),
        ("import text_vae absent.pth", "path=absent.pth: no such file or folder"),
        ("import text_vae hf:org/repo/optimus-vae.pth@main", "pin a commit"),
        ("import versatile_diffusion absent.pth outptu=x", "outptu: no such setting; did you mean"),
        ("export", "export : no such format; choose from versatile_diffusion, safetensors, diffusers"),
        ("export onnx out", "export onnx: no such format"),
        ("export safetensors", "takes one output, got 0"),
        ("export safetensors out checkpoint=absent", "checkpoint=absent: does not exist"),
        (
            "export safetensors out checkpoint=vd.pth",
            "checkpoint=vd.pth: no such file; import published weights first",
        ),
        ("export safetensors out weights=best", "weights=best: choose from ema, model"),
        ("export safetensors out precision=fp8", "precision=fp8: choose from fp32, fp16, bf16, keep"),
        (
            "export safetensors out.safetensors",
            "output=out.safetensors: the result is a folder, not a file; leave out .safetensors",
        ),
        ("export diffusers out.bin", "output=out.bin: the result is a folder"),
        ("export versatile_diffusion out.safetensors", "the result is a PyTorch file; end its name with .pth"),
        ("import versatile_diffusion vd.pth output=vd.pth", "output=vd.pth: the result is a weights folder"),
        ("export safetensors {here}", "exists already; overwrite=true replaces it"),
    ],
)
def test_a_mistake_is_one_line(line: str, message: str, tmp_path: Path, capsys) -> None:
    assert main(["weights", *shlex.split(line.format(here=tmp_path))]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1


def test_part_of_a_model_is_exported_as_what_it_is(tmp_path: Path, capsys) -> None:
    first_stage = {name: tensor for name, tensor in weights().items() if "text" not in name}
    write_weights_folder(tmp_path / "w", first_stage, MODEL)
    source = f"checkpoint={tmp_path / 'w'}"
    assert main(["weights", "export", "safetensors", str(tmp_path / "out"), source]) == 0
    assert same(open_weights_folder(tmp_path / "out"), first_stage)
    again = ["weights", "import", "safetensors", str(tmp_path / "out"), f"output={tmp_path / 'again'}", "model=tiny"]
    assert main(again) == 0
    assert main(["weights", "export", "diffusers", str(tmp_path / "pipeline"), source]) == 2
    assert "no layers of" in capsys.readouterr().err
    assert not (tmp_path / "pipeline").exists()


def test_values_beyond_half_precision_are_refused(tmp_path: Path, capsys) -> None:
    name = "data_layers.text.11.2.bias"
    write_weights_folder(tmp_path / "w", weights() | {name: weights()[name] + 70_000}, MODEL)
    for words in (["versatile_diffusion", "out.pth"], ["safetensors", "out"], ["diffusers", "out"]):
        export = ["export", words[0], str(tmp_path / words[1]), f"checkpoint={tmp_path / 'w'}"]
        assert main(["weights", *export, "precision=fp16"]) == 2
        assert (
            f"precision=fp16: {name} holds values beyond its range; choose bf16, fp32 or keep"
            in capsys.readouterr().err
        )
        assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert main(["weights", *export, "precision=bf16"]) == 0


def test_every_address_is_pinned() -> None:
    assert len(ADDRESSES) == 8
    for name, address in ADDRESSES.items():
        assert name in SOURCES
        assert ADDRESS.fullmatch(address)
        assert COMMIT.fullmatch(address.partition("@")[2])


def test_every_precision_is_a_choice() -> None:
    precision = look_up(WeightsConfig, "precision")
    assert precision is not None
    assert tuple(PRECISIONS) == precision.about.choices


def test_help_has_every_source_without_pytorch() -> None:
    script = "import sys; from vdtrain.cli import main; main(['weights', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    for name, read in SOURCES.items():
        assert f"  {name:<21}{read.__doc__.splitlines()[0].removesuffix('.')}" in lines
    for place in (*ADDRESSES.values(), *FOLDERS.values()):
        assert any(line.endswith(f" {place}") for line in lines)
