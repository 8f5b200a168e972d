"""The way of a new user, as typed: own images, or tars of another program, to a fine-tuned model and its export."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from miniature.shapes import caption, draw, sample_scene
from tests import programs
from tests.evaluation.test_evaluate import write_checkpoint
from tests.pairs import all_samples
from vdtrain.cli import main
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.flows import all_flows

IMAGES, BATCH, STEPS = 200, 8, 4
SMALL = "model=tiny hardware=cpu tracking=none"
TRAIN = f"vdtrain train stage=finetune_four_flow data=own {SMALL} log_every_steps=1 stage.global_batch_size={BATCH}"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a file of the layout of 2023."""
    folder = tmp_path_factory.mktemp("released")
    write_checkpoint(folder / "model", all_flows(["image", "text"]))
    file = folder / "vd-four-flow-v1-0.pth"
    assert main(["weights", "export", "versatile_diffusion", str(file), f"checkpoint={folder}/model"]) == 0
    return file


def write_folder(top: Path) -> None:
    """A folder of images with captions beside them, as people have it."""
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        scene = sample_scene(generator)
        place = top / f"album {number % 3}" / f"IMG_{number:04d}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(scene, 96)).save(place.with_suffix((".JPG", ".png", ".webp")[number % 3]))
        place.with_suffix(".txt").write_text(caption(scene, generator) + "\n")


def write_tars(top: Path) -> None:
    """Shards as another program makes them with the webdataset library."""
    generator = np.random.default_rng(0)
    top.mkdir()
    with webdataset.ShardWriter(f"{top}/train-%03d.tar", maxcount=70, verbose=0) as writer:
        for number in range(IMAGES):
            scene, place = sample_scene(generator), io.BytesIO()
            Image.fromarray(draw(scene, 96)).save(place, "PNG")
            text = caption(scene, generator)
            writer.write({"__key__": f"set/{number:05d}", "png": place.getvalue(), "txt": text, "cls": 3})


PREPARE = {
    "folder": (
        write_folder,
        [
            "python -m data_pipeline pack photos data.pack.image_size=64 data.pack.min_image_size=32",
            "python -m data_pipeline index data=own data.shards=data/own/packed data.index.processes=1",
        ],
    ),
    "tars": (write_tars, ["vdtrain data index data=own data.shards=photos data.index.processes=1"]),
}


@pytest.mark.parametrize("kind", ["folder", pytest.param("tars", marks=pytest.mark.slow)])
def test_from_own_data_to_an_export(kind: str, released: Path, tmp_path: Path) -> None:
    write, commands = PREPARE[kind]
    write(tmp_path / "photos")
    environment = {**os.environ, "PATH": f"{programs.folder()}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    lines = [
        f"vdtrain weights import versatile_diffusion {released} model=tiny",
        *commands,
        "python -m data_pipeline inspect data/own/manifest",
        f"{TRAIN} 'stage.phases=[{{resolution: 64, samples: {BATCH * STEPS}}}]' optimizer.warmup_samples=0",
        'vdtrain sample runs/finetune_four_flow "a red circle" resolution=64 steps=2 device=cpu',
        "vdtrain sample runs/finetune_four_flow samples/0000.png flow=image-to-text resolution=64 steps=2 device=cpu",
        "vdtrain weights export versatile_diffusion mine.pth runs/finetune_four_flow weights=model",
    ]
    for line in lines:
        done = subprocess.run(["bash", "-ec", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    # Every image arrives with its caption.
    listed = all_samples(tmp_path / "data/own/manifest")
    generator = np.random.default_rng(0)
    written = [caption(sample_scene(generator), generator) for _ in range(IMAGES)]
    assert sorted(listed["caption"].to_pylist()) == sorted(written)
    records = [json.loads(line) for line in (tmp_path / "runs/finetune_four_flow/metrics.jsonl").open()]
    assert records[-1]["step"] == STEPS
    assert Image.open(tmp_path / "samples" / "0000.png").size == (64, 64)
    assert (tmp_path / "samples" / "captions.txt").read_text().strip()
    # The run began at the released weights: no weight went further than Adam can in so many steps.
    before, after = (torch.load(file, weights_only=True) for file in (released, tmp_path / "mine.pth"))
    assert before.keys() == after.keys()
    config = to_object(compose("train", ["stage=finetune_four_flow", "model=tiny"]), TrainConfig)
    furthest = STEPS * config.stage.learning_rate * config.optimizer.learning_rate_scale
    moved = {key: float((after[key].float() - before[key].float()).abs().max()) for key in before}
    assert 0 < max(moved.values()) <= 1.01 * furthest


@pytest.mark.slow
def test_figures_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory and hours are those of `vdtrain plan`."""
    page = (Path(__file__).parents[1] / "docs" / "finetune.md").read_text()
    rows = re.findall(r"\| (\d) x `(\w+)`(, micro-batches of 4)? \| (\d+) of \d+ GB \| ([\d.]+) \|", page)
    assert len(rows) == 4
    for gpus, hardware, small, peak, hours in rows:
        micro = ["hardware.micro_batch_size={512: 4}"] if small else []
        words = ["stage=finetune_four_flow", f"hardware={hardware}", f"gpus={gpus}", *micro, "format=json"]
        assert main(["plan", *words]) == 0
        plan = json.loads(capsys.readouterr().out)
        spent = sum(phase["gpu_hours"] for phase in plan["times"]) / int(gpus)
        assert (f"{plan['phases'][0]['peak'] / 1e9:.0f}", f"{spent:.1f}") == (peak, hours)


def test_numbers_of_fine_tuning() -> None:
    config = to_object(compose("train", ["stage=finetune_four_flow"]), TrainConfig)
    assert (config.stage.learning_rate, config.stage.global_batch_size) == (1e-5, 64)
    assert [(phase.resolution, phase.samples) for phase in config.stage.phases] == [(512, 640_000)]
    assert config.optimizer.warmup_samples == 10_000
    assert config.stage.init_from == "weights/versatile_diffusion"
    # A resumed or longer run of a stage of the curriculum keeps its own.
    assert to_object(compose("train", []), TrainConfig).optimizer.warmup_samples == 1_000_000
