"""docs/modalities.md, step by step at a small size: from tars of tones to sounds and their figure."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.__main__ import main as data_pipeline
from examples.audio import draw, train_vae
from examples.audio.sound import MODALITY_FIGURES, SAMPLES, pitch, read_wave, spectrogram, wave_bytes, waveform
from tests.programs import program
from vdtrain.commands.evaluate import main as evaluate
from vdtrain.commands.sample import main as sample
from vdtrain.commands.train import main as train
from vdtrain.flows import all_flows
from vdtrain.tracking.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "modalities.md").read_text()
FLOWS = {flow.name for flow in all_flows(["image", "text", "audio"])}
# What makes each command of the page small.
SMALL: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "python -m examples.audio.draw": (draw.main, ["--scale", "0.1"]),
    "python -m examples.audio.train_vae": (train_vae.main, ["--steps", "20"]),
    "python -m data_pipeline": (data_pipeline, []),
    "vdtrain train": (
        train,
        [
            "stage.phases=[{resolution:32,samples:48}]",
            "stage.global_batch_size=16",
            "log_every_steps=1",
            "tracking=none",
        ],
    ),
    "vdtrain sample": (sample, ["steps=2"]),
    "vdtrain evaluate": (evaluate, ["samples=4", "steps=2"]),
}
# Nothing else may be in the page's first block.
COMMANDS = re.sub(r"\\\n\s*", "", re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)[0]).splitlines()


def small(command: str) -> tuple[Callable[..., Any], list[str], list[str]]:
    """The entry point of a command, its arguments here, and the words as typed."""
    name = next(name for name in SMALL if command.startswith(f"{name} "))
    action, more = SMALL[name]
    words = [*shlex.split(command)[len(name.split()) :], *more]
    # A setting cannot be given twice.
    kept = {word.partition("=")[0] if "=" in word else number: word for number, word in enumerate(words)}
    return action, list(kept.values()), [*name.split(), *kept.values()]


def place(folder: Path) -> None:
    (folder / "examples").symlink_to(ROOT / "examples")


def check(folder: Path) -> None:
    """Look at what every command should have left."""
    logged = read_metrics(folder / "demo" / "audio" / "runs" / "nine_flow")
    assert set().union(*(record["loss"] for record in logged)) == FLOWS
    with wave.open(str(folder / "demo" / "audio" / "samples" / "0000.wav")) as file:
        assert (file.getnframes(), file.getframerate()) == (SAMPLES, 8000)
    found = json.loads((folder / "demo" / "audio" / "evaluation" / "metrics.json").read_text())
    assert found["flows"].keys() == {"text-to-audio", "audio-to-audio"}
    assert all(0 <= figures["pitch_error"] < 60 for figures in found["flows"].values())
    assert found["settings"]["pairs"].endswith("those with audio and text, held out 0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the page has run."""
    folder = tmp_path_factory.mktemp("audio")
    place(folder)
    assert COMMANDS[0].startswith("export PYTHONPATH=.")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS[1:]:
            action, arguments, _ = small(command)
            assert not action(arguments), command
    return folder


@pytest.mark.slow
def test_every_step_of_the_page(folder: Path) -> None:
    check(folder)


@pytest.mark.slow
def test_the_pages_python_makes_and_blends_sounds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(from vdtrain.*?)```", PAGE, re.DOTALL)
    made: dict[str, Any] = {}
    exec(code.replace("width=32)", "width=32, steps=2)"), made)
    assert made["waveforms"].shape == made["blended"].shape == (1, SAMPLES)
    assert made["waveforms"].abs().max() <= 1


@pytest.mark.slow
def test_an_untrusted_module_is_not_imported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"checkpoint={folder}/demo/audio/runs/nine_flow", "flows=[text-to-audio]", "data=shapes"]
    assert evaluate([*arguments, f"output_dir={folder}/untrusted", "device=cpu"]) == 2
    assert "if you trust who made it, add 'trust=[examples.audio" in capsys.readouterr().err


def test_the_page_shows_the_example_as_it_is() -> None:
    example = ROOT / "examples" / "audio"
    _, options = (example / "conf" / "model" / "tiny_with_audio.yaml").read_text().split("\n", 1)
    sources = {name: (example / name).read_text() for name in ("conf/data/tones.yaml", "sound.py")}
    assert f"```yaml\n{options}```" in PAGE
    (settings,) = re.findall(r"```yaml\n(index:.*?)```", PAGE, re.DOTALL)
    assert all(line in sources["conf/data/tones.yaml"].splitlines() for line in settings.splitlines())
    registered = re.findall(r"`(MODALITY_IO\[.*)`|^(MODALITY_FIGURES\[.*)", PAGE, re.MULTILINE)
    lines = [line for found in registered for line in found if line]
    assert len(lines) == 2
    assert all(line in sources["sound.py"].splitlines() for line in lines)


@pytest.mark.slow
def test_the_page_as_typed(tmp_path: Path) -> None:
    place(tmp_path)
    environment = {**os.environ, "PYTHONPATH": f".{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    for command in COMMANDS[1:]:
        _, _, words = small(command)
        subprocess.run([program(words[0]), *words[1:]], cwd=tmp_path, env=environment, check=True, timeout=300)
    check(tmp_path)


@pytest.mark.parametrize("hertz", [262.0, 523.0, 1047.0])
def test_a_spectrogram_keeps_the_pitch(hertz: float) -> None:
    sound = 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(SAMPLES) / 8000)[None]
    expected = 12 * torch.log2(torch.tensor(hertz))
    # A bin has 15.6 Hz, a semitone of the lowest one.
    assert pitch(sound)[0, 0] == pytest.approx(expected, abs=0.5)
    back = waveform(spectrogram(sound))
    assert pitch(back)[0, 0] == pytest.approx(expected, abs=0.5)
    assert (spectrogram(back) - spectrogram(sound)).abs().mean() < 0.05
    figures = MODALITY_FIGURES["audio"].figures(pitch(sound) + 12, pitch(sound))
    assert figures["pitch_error"] == pytest.approx(12)


def test_waves_are_read_as_they_were_written() -> None:
    sound = torch.rand(SAMPLES) * 2 - 1
    torch.testing.assert_close(read_wave(wave_bytes(sound)), sound, atol=1e-4, rtol=0)
    assert read_wave(wave_bytes(sound[:100]))[100:].eq(0).all()
    with pytest.raises(ValueError, match="no WAV file"):
        read_wave(b"RIFF")
