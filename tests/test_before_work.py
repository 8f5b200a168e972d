"""Mistakes of the commands that sample are said before a model is loaded, and the commands say what they take."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.evaluation.test_evaluate import write_checkpoint
from tests.pairs import write_pairs
from tests.programs import program
from tests.settings import TINY, phases
from tests.training.forks import Case, run_cases
from vdtrain.cli import main
from vdtrain.flows import Flow, all_flows
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.image_layers import ImageDataLayers
from vdtrain.pipeline import VersatileDiffusion

MOVED = [
    "model.modalities.image.vae.weights=weights/vae.safetensors",
    "model.modalities.image.context_encoder.weights=weights/clip.safetensors",
    "model.modalities.text.context_encoder.weights=weights/clip.safetensors",
    "model.modalities.text.vae.weights=weights/optimus.safetensors",
    "model.modalities.text.vae.encoder_tokenizer=weights/bert.json",
    "model.modalities.text.vae.decoder_tokenizer=weights/gpt2.json",
]
SMALL = ["resolution=32", "steps=2", "guidance_scale=1"]
EXHAUSTED = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 39.38 GiB."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of four flows and of one, pairs, an image and a file that is none."""
    made = tmp_path_factory.mktemp("before")
    write_checkpoint(made / "model", all_flows(["image", "text"]))
    write_checkpoint(made / "stage1", [Flow("image", "image")])
    write_checkpoint(made / "moved", all_flows(["image", "text"]), *MOVED)
    write_pairs(made / "data", shards=1, count=12)
    Image.new("RGB", (40, 40), "red").save(made / "red.png")
    (made / "torn.png").write_bytes((made / "red.png").read_bytes()[:60])
    (made / "mine").write_text("a file")
    return made


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the same names in it."""
    for each in folder.iterdir():
        (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a model that is built, or a weight that is read, fails the test."""

    def fail(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(VersatileDiffusion, "from_checkpoint", fail)
    monkeypatch.setattr(Diffuser, "__init__", fail)
    monkeypatch.setattr("vdtrain.models.frozen_weights.load_file", fail)


IMAGE_IN = ["red.png", "flow=image-to-image"]
MISTAKES = [
    (["sample", "model", "a", "output_dir=mine"], "output_dir=mine: cannot be written (mine is a file, not a folder)"),
    (["sample", "model", "a", "output_dir=mine/deeper"], "output_dir=mine/deeper: cannot be written"),
    (["sample", "model", "a", "flow=text-to-imgae"], "no layers for 'imgae'; did you mean image?"),
    (["sample", "model", "a", "flow=sideways"], "CONTEXT-to-OUTPUT"),
    (["sample", "stage1", "a"], "flow=text-to-image: this checkpoint has no layers for 'text'; sample from a later"),
    (["sample", "model", "a", "steps=0"], "steps=0: choose 1 to 1000"),
    (["sample", "model", "a", "steps=1001"], "steps=1001: choose 1 to 1000"),
    (["sample", "model", "a", "solver=unipc", "eta=0.5"], "eta=0.5: only solver=ddim takes it"),
    (["sample", "model", "a", "eta=2"], "eta=2.0: must be from 0"),
    (["sample", "model", "a", "resolution=40"], "height=40: not a multiple of 16"),
    (["sample", "model", "a", "width=8"], "width=8: not a multiple of 16"),
    (["sample", "model", "a", "focus=2"], "focus=2.0: must be from 0"),
    (["sample", "model", "a", "fidelity=2"], "fidelity=2.0: must be from 0"),
    (["sample", "model", "a", "fidelity=0.5"], "start_from: empty; fidelity=0.5 needs one"),
    (["sample", "model", "a", "start_from=gone.png", "fidelity=0.5"], "gone.png: cannot be read"),
    (["sample", "model", "a", "samples_per_input=0"], "samples_per_input=0: must be at least 1"),
    (["sample", "model", "gone.png", "flow=image-to-image"], "gone.png: cannot be read"),
    (["sample", "model", "red.png", "torn.png", "flow=image-to-text"], "torn.png: "),
    (["sample", "model", "mine", "flow=image-to-text"], "mine: "),
    (["sample", "model", "a", "device=cuda"], "device=cuda: PyTorch finds no GPU here"),
    (["sample", "model", "cat.jpg"], "inputs.0=cat.jpg: looks like a file, but captions are taken here; literal=true"),
    (["sample", "model", "red.png"], "literal=true takes it as a caption, and flow=image-to-image as a file"),
    (["sample", "model", "mine", "flow=text-to-text"], "literal=true takes it as a caption, and flow=image-to-text"),
    (["sample", "model", "a cat", "flow=image-to-image"], "for a caption write flow=text-to-image"),
    (["blend", "model", "text:a", "image:gone.png"], "gone.png: cannot be read"),
    (["blend", "model", "text:cat.jpg"], "contexts.0.text=cat.jpg: looks like a file"),
    (["blend", "model", "sound:a.wav"], "no layers for 'sound'"),
    (["blend", "model", "text:a", "output=imag"], "no layers for 'imag'; did you mean image?"),
    (["blend", "model", "contexts=[{text: a, weight: -1}]"], "none may be negative"),
    (["blend", "model", "contexts=[{text: a, mask: red.png}]"], "contexts of modality 'text' take no mask"),
    (["blend", "model", "contexts=[{image: red.png, mask: torn.png}]"], "torn.png: "),
    (["blend", "model", "contexts=[]"], "contexts: empty"),
    (["blend", "model", "text:a", "output_dir=mine"], "output_dir=mine: cannot be written"),
    (["edit", "model", "red.png", "remove=", "add="], "remove, add: both are empty"),
    (["edit", "model", "red.png", "text_share=1"], "text_share=1.0: must be between 0 and 1"),
    (["edit", "model", "red.png", "add=star.png"], "add=star.png: looks like a file"),
    (["edit", "model", "gone.png"], "gone.png: cannot be read"),
    (["edit", "stage1", "red.png"], "no layers for 'text'"),
    (["evaluate", "model", "steps=0"], "steps=0: choose 1 to 1000"),
    (["evaluate", "model", "resolution=40"], "height=40: not a multiple of 16"),
    (["evaluate", "model", "output_dir=mine"], "output_dir=mine: cannot be written"),
    (["evaluate", "model", "device=cuda"], "device=cuda: PyTorch finds no GPU here"),
    (["weights", "export", "safetensors", "mine/out", "model"], "output=mine/out: cannot be written"),
    (["weights", "export", "safetensors", "red.png", "model"], "exists already; overwrite=true replaces it"),
    # Whatever a folder of other things holds, it is lost if it is replaced.
    (["weights", "export", "safetensors", "data", "model", "overwrite=true"], "output=data: data holds other"),
    (["weights", "export", "diffusers", "data", "model", "overwrite=true"], "output=data: data holds other"),
    (["weights", "export", "versatile_diffusion", "data", "model", "overwrite=true"], "data is a folder, not a"),
    (["weights", "import", "safetensors", "x", "output=data", "overwrite=true"], "output=data: data holds other"),
    (["report", "model", "output=data", "overwrite=true"], "output=data: cannot be written (data is a folder"),
    (["compare", "model", "model", "output=data", "overwrite=true"], "(data is a folder, not a file)"),
    (["bench", "model=tiny", "hardware=cpu", "output=data", "overwrite=true"], "(data is a folder, not a file)"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_said_before_a_model_is_loaded(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    unloadable(monkeypatch)
    before = sorted(here.rglob("*"))
    more = ["data=shapes", f"data.manifest={here}/data/manifest"] if words[0] == "evaluate" else []
    assert main([*words, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert sorted(here.rglob("*")) == before


def test_missing_weights_are_one_line_with_all_commands(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ("image_vae", "text_vae", "clip", "bert_tokenizer", "gpt2_tokenizer")
    unloadable(monkeypatch)
    assert main(["sample", "moved", "a red circle"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(f"`vdtrain weights import {source} model=tiny`" in line for source in sources)
    assert "`vdtrain weights import all model=tiny`" in line
    # Training at full size needs the start of stage 1 too.
    assert main(["train", "stage=stage1_single_flow", "hardware=h200", "tracking=none"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "6 files of weights are missing; `vdtrain weights import all` makes" in line
    assert all(f"`vdtrain weights import {source}`" in line for source in (*sources, "stable_diffusion"))


def test_a_command_says_what_it_takes_and_samples_are_numbered_on(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "model", "a red circle", "a star", "seed=3", "steps=2"]) == 0
    said = capsys.readouterr()
    assert said.out.split() == ["samples/0000.png", "samples/0001.png"]
    # The resolution is that of the model, and the device the CPU, as there is no GPU.
    expected = "model, text-to-image, on cpu in fp32, 64 x 64, ddim with 2 steps, guidance 7.5, seed 3, into samples"
    assert said.err.splitlines()[0] == f"takes: {expected}"
    first = Path("samples/0000.png").read_bytes()
    assert main(["sample", "model", "a blue star", *SMALL]) == 0
    said = capsys.readouterr()
    assert said.out.split() == ["samples/0002.png"]
    assert "note: samples holds 2 samples; numbers go on from 0002, and overwrite=true replaces them" in said.err
    assert Path("samples/0000.png").read_bytes() == first
    for number in (0, 1):
        assert main(["sample", "model", "samples/0000.png", "flow=image-to-text", *SMALL]) == 0
        name = "captions-0001.txt" if number else "captions.txt"
        assert capsys.readouterr().out.splitlines()[0] == f"samples/{name}"
    assert main(["blend", "model", "text:a", "image:red.png", "overwrite=true", *SMALL]) == 0
    assert capsys.readouterr().out.split() == ["samples/0000.png"]
    assert Path("samples/0000.png").read_bytes() != first
    assert main(["edit", "model", "red.png", *SMALL]) == 0
    assert capsys.readouterr().out.split()[-1] == "samples/0003.png"
    # A page of a blind comparison still knows which sample came from which caption.
    assert main(["sample", "model", "a red circle", "a star", "a blue star", "output_dir=other", *SMALL]) == 0
    capsys.readouterr()
    assert main(["compare", "samples", "other"]) == 0


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("words", "answer", "made"),
    [
        (["sample", "model", "cat.jpg"], "y\n", "text-to-image"),
        (["sample", "model", "cat.jpg"], "\n", None),
        (["sample", "model", "a cat", "flow=image-to-image"], "yes\n", "text-to-image"),
        (["sample", "model", "a cat", "flow=image-to-image"], "n\n", None),
    ],
)
def test_a_terminal_is_asked(
    here: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], answer: str, made: str | None
) -> None:
    stderr = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("sys.stderr", stderr)
    assert main([*words, *SMALL]) == (2 if made is None else 0)
    assert "[y/N]" in stderr.getvalue()
    if made is not None:
        with Image.open("samples/0000.png") as image:
            assert json.loads(image.info["vdtrain"])["flow"] == made


def test_the_setting_answers_the_question(here: Path) -> None:
    assert main(["sample", "model", "cat.jpg", "literal=true", *SMALL]) == 0


@pytest.mark.slow
def test_a_real_terminal_is_asked(here: Path) -> None:
    control, terminal = pty.openpty()
    command = [program("vdtrain"), "sample", "model", "cat.jpg", *SMALL]
    with subprocess.Popen(command, stdin=terminal, stderr=terminal, stdout=subprocess.PIPE, text=True) as process:
        os.close(terminal)
        said = b""
        while b"[y/N]" not in said:
            said += os.read(control, 1000)
        os.write(control, b"y\n")
        out, _ = process.communicate(timeout=300)
    assert out.split() == ["samples/0000.png"]


def starved(*arguments: Any, **settings: Any) -> None:
    raise torch.OutOfMemoryError(EXHAUSTED)


class Hungry(ImageDataLayers):
    """Layers that find no memory."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for module in self.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(starved)


def test_memory_that_is_out_while_sampling_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Diffuser, "predict", starved)
    for words in (["sample", "model", "a"], ["blend", "model", "text:a"], ["edit", "model", "red.png"]):
        assert main([*words, *SMALL]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: out of memory (CUDA out of memory)")
        assert all(remedy in line for remedy in ("batch_size=4", "precision=bf16", "a smaller resolution"))
    words = ["data=shapes", "data.manifest=data/manifest", "data.validation.share=0", "samples=2", "steps=1"]
    assert main(["evaluate", "model", *words, "flows=[text-to-image]"]) == 1
    assert "error: out of memory (CUDA out of memory); try batch_size=8" in capsys.readouterr().err


def test_memory_that_is_out_while_training_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    words = [
        *TINY,
        "stage=stage1_single_flow",
        "stage.global_batch_size=4",
        phases(4, (32, 2)),
        "hardware.micro_batch_size={32: 4}",
        "data.manifest=data/manifest",
        "model.modalities.image.data_layers._target_=tests.test_before_work.Hungry",
    ]
    (ending,) = run_cases(here / "cases", [Case(1, words)])
    assert ending.statuses == [1]
    assert "Traceback" not in ending.logs[0]
    (line,) = [line for line in ending.logs[0].splitlines() if line.startswith("error: ")]
    assert line.startswith("error: process 0: out of memory (CUDA out of memory); try hardware.micro_batch_size.32=2")
    assert "hardware.activation_checkpointing=blocks" in line
