"""The transcripts of examples/first_hour, each to its end; tests/slurm/test_chain.py runs the cluster's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import wave
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.browser import PROGRAMS
from tests.clones import ROOT, make_clone
from tests.documents.checkout import free_port
from vdtrain.flows import all_flows


def transcript(folder: Path, script: str, *words: str) -> str:
    """What a script prints, started from the root of what looks like a fresh clone."""
    make_clone(folder)
    done = subprocess.run(
        ["bash", f"examples/first_hour/{script}.sh", *words],
        cwd=folder,
        env={**os.environ, "WANDB_MODE": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def commands(printed: str) -> list[str]:
    return re.findall(r"^\$ (?:vdtrain|python -m data_pipeline) (\w+)", printed, flags=re.MULTILINE)


@pytest.mark.slow
def test_fine_tuning_ends_with_exports(tmp_path: Path) -> None:
    printed = transcript(tmp_path, "fine_tune")
    page = (ROOT / "docs" / "finetune.md").read_text()
    shown = [
        "pack",
        "index",
        "inspect",
        "weights",
        "plan",
        "preflight",
        "train",
        "sample",
        "sample",
        "weights",
        "weights",
    ]
    assert commands(printed) == shown
    assert all(re.search(rf"^(vdtrain|python -m data_pipeline) {word} ", page, re.MULTILINE) for word in shown)
    made = tmp_path / "demo" / "fine_tune"
    records = [json.loads(line) for line in (made / "runs/finetune_four_flow/metrics.jsonl").open()]
    assert records[-1]["step"] == 4
    assert (made / "samples" / "captions.txt").exists()
    before, after = (torch.load(made / name, weights_only=True) for name in ("vd-four-flow-v1-0.pth", "mine.pth"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key].half(), after[key]) for key in before)
    assert (made / "mine-diffusers" / "model_index.json").exists()


@pytest.mark.slow
def test_a_third_modality_ends_with_nine_flows(tmp_path: Path) -> None:
    transcript(tmp_path, "modality")
    made, flows = tmp_path / "demo" / "audio", all_flows(["image", "text", "audio"])
    records = [json.loads(line) for line in (made / "runs" / "nine_flow" / "metrics.jsonl").open()]
    # A flow without a pair in a step has no loss there.
    assert set().union(*(record["loss"] for record in records)) == {flow.name for flow in flows}
    files = {"image": "0000.png", "text": "captions.txt", "audio": "0000.wav"}
    for flow in flows:
        assert (made / "samples" / flow.name / files[flow.output]).exists(), flow.name
    with wave.open(str(made / "samples" / "text-to-audio" / "0000.wav")) as sound:
        assert sound.getnframes()


@pytest.mark.skipif(not any(map(shutil.which, PROGRAMS)), reason="Chromium is missing")
def test_playing_ends_with_a_picture_and_the_page(tmp_path: Path) -> None:
    transcript(tmp_path, "play", str(free_port()))
    picture, page = (Image.open(tmp_path / "demo" / "play" / name) for name in ("samples/0000.png", "app.png"))
    red, green, blue = picture.convert("RGB").resize((3, 3)).getpixel((1, 1))
    assert red > 1.5 * max(green, blue)
    assert page.size[0] == 1280
    # A page that has not been drawn is of one colour.
    assert len(page.convert("RGB").getcolors(1 << 24) or ()) > 100
