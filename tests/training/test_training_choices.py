"""Choices of training that are off by default, in runs as a user types them: stopped, resumed, exported, sampled."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import settings
from tests.pairs import write_pairs
from tests.tiny_runs import BATCH, HIGH, LOW, STEPS, overrides
from tests.training.forks import Case, Ending, run_cases
from tests.training.read_back import read_weights
from vdtrain.checkpoint.folder import CHECKPOINTS, latest_by_sizes
from vdtrain.checkpoint.format import Index
from vdtrain.commands.plan import main as plan
from vdtrain.commands.preflight import main as preflight
from vdtrain.commands.sample import main as sample
from vdtrain.commands.train import main as train
from vdtrain.commands.weights import main as weights
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import learning_rate
from vdtrain.models.diffuser import Diffuser, layer_group, parameters_by_group
from vdtrain.models.trained import is_adapter
from vdtrain.tracking.metrics import read_metrics
from vdtrain.training.start import open_weights
from vdtrain.weights.folder import open_weights_folder

RATES = ["optimizer.schedule=cosine", "optimizer.final_share=0.1", f"optimizer.warmup_samples={2 * BATCH}"]
CHOICES = [*RATES, "objective.min_snr_gamma=5", "objective.offset_noise=0.1", "data.flip=true"]
FROZEN = ["stage.gradient_scales.global=0", "stage.gradient_scales.data.image=0"]
LORA = ["lora.rank=2", "lora.alpha=6", "lora.groups=[data.image,context.text]"]
STOPPED = ["data.stream._target_=tests.tiny_runs.EndingStream", "+data.stream.name=SIGTERM", "+data.stream.at=1"]


def load(*words: str) -> TrainConfig:
    return to_object(compose("train", [*settings.TINY, "stage=stage1_single_flow", *words]), TrainConfig)


def newest(run: Path) -> Path:
    found, _ = latest_by_sizes(run / CHECKPOINTS)
    assert found is not None
    return found.path


@dataclass(frozen=True)
class Runs:
    folder: Path
    endings: dict[str, Ending]

    def weights(self, name: str, which: str = "model") -> dict[str, torch.Tensor]:
        return read_weights(newest(self.folder / name), which)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("choices")
    write_pairs(folder / "data")
    common = ["stage=stage3_four_flow", *overrides(folder), "hardware.micro_batch_size={32:2,64:2}"]
    scratch = [*common, "stage.init_from=null"]
    adapted = [*common, f"stage.init_from={folder}/whole", *LORA, *CHOICES]
    longer = settings.phases(BATCH, (32, LOW), (64, HIGH + 1))
    starts: dict[str, list[str]] = {
        "whole": [*scratch, *CHOICES, f"run_dir={folder}/whole"],
        "frozen": [*scratch, *FROZEN, f"run_dir={folder}/frozen"],
        "thawed": [*scratch, f"run_dir={folder}/frozen", longer],
        "adapted": [*adapted, f"run_dir={folder}/adapted"],
        "stopped": [*adapted, f"run_dir={folder}/again", *STOPPED],
        "resumed": [*adapted, f"run_dir={folder}/again"],
    }

    def keep(number: int) -> None:
        if [*starts][number] == "thawed":
            shutil.copytree(folder / "frozen", folder / "as it was frozen")

    found = run_cases(folder / "cases", [Case(1, words) for words in starts.values()], keep)
    endings = dict(zip(starts, found, strict=True))
    for name, ending in endings.items():
        assert ending.statuses == [75 if name == "stopped" else 0], f"{name} {ending}"
    return Runs(folder, endings)


# --- learning rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_learning_rate_rises_and_falls_over_the_whole_stage(schedule: str) -> None:
    phases = "stage.phases=[{resolution:32,samples:600},{resolution:64,samples:400}]"
    share = "optimizer.final_share=0" if schedule == "constant" else "optimizer.final_share=0.2"
    words = ["stage.global_batch_size=10", phases, f"optimizer.schedule={schedule}", share]
    config = load(*words, "optimizer.warmup_samples=200", "stage.learning_rate=1", "optimizer.learning_rate_scale=1")
    rates = [learning_rate(config, step) for step in range(1, 101)]
    assert rates[:20] == [step / 20 for step in range(1, 21)]
    for step, rate in enumerate(rates[19:], start=20):
        way = (step - 20) / 80
        fallen = {"constant": 1.0, "linear": 1 - way, "cosine": (1 + math.cos(math.pi * way)) / 2}[schedule]
        floor = 0.0 if schedule == "constant" else 0.2
        assert rate == pytest.approx(floor + (1 - floor) * fallen)
    assert rates[-1] == (1.0 if schedule == "constant" else 0.2)
    # A pilot run is a small copy of the whole one.
    pilot = load(*words, "optimizer.warmup_samples=200", "stage.learning_rate=1", "stage.samples_scale=0.5")
    scale = pilot.optimizer.learning_rate_scale
    assert [learning_rate(pilot, step) for step in range(1, 51)] == pytest.approx(
        [scale * rate for rate in rates[1::2]]
    )


def test_a_warm_up_longer_than_the_stage_never_falls() -> None:
    config = load("stage.global_batch_size=10", "optimizer.warmup_samples=20000", "optimizer.schedule=cosine")
    total = sum(phase.samples for phase in config.stage.phases) // 10
    assert learning_rate(config, total) == pytest.approx(
        config.stage.learning_rate * config.optimizer.learning_rate_scale * total * 10 / 20000
    )


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_with_adapters_and_every_choice_ends_with_the_bits_of_one_that_was_not_stopped(
    runs: Runs,
) -> None:
    for which in ("model", "ema"):
        one, other = runs.weights("adapted", which), runs.weights("again", which)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    whole, resumed = (read_metrics(runs.folder / name) for name in ("adapted", "again"))
    assert [record["loss"] for record in whole] == [record["loss"] for record in resumed]
    config = load(*overrides(runs.folder), *RATES, "stage=stage3_four_flow")
    assert [record["learning_rate"] for record in resumed] == [learning_rate(config, step + 1) for step in range(STEPS)]


def test_a_schedule_that_a_resumed_run_changes_is_said(runs: Runs, capsys: Any) -> None:
    words = ["stage=stage3_four_flow", *overrides(runs.folder), *CHOICES, f"run_dir={runs.folder}/whole"]
    words += ["stage.init_from=null", "data.flip=false", settings.phases(BATCH, (32, LOW), (64, HIGH + 1))]
    assert preflight(words) == 0
    said = capsys.readouterr().out
    was, becomes = HIGH * BATCH, (HIGH + 1) * BATCH
    assert (
        f"stage.phases.1.samples={becomes}: was {was} until now; optimizer.schedule=cosine falls until the new end"
        in said
    )
    assert "data.flip=false: was true until now" in said


def test_a_frozen_group_takes_no_state_and_starts_anew_when_it_is_trained_again(runs: Runs) -> None:
    frozen, thawed = runs.folder / "as it was frozen", runs.folder / "frozen"
    index, later = Index.read(newest(frozen)), Index.read(newest(thawed))
    assert [layout.group for layout in index.groups] == ["context.image", "context.text", "data.text"]
    assert later.group_steps == {"global": 1, "data.image": 1}
    assert later.optimizer_steps == STEPS + 1
    before, after, whole = (runs.weights(name) for name in ("as it was frozen", "frozen", "whole"))
    average = runs.weights("as it was frozen", "ema")
    assert before.keys() == after.keys() == whole.keys()
    held = [name for name in before if layer_group(name) in ("global", "data.image")]
    assert all(torch.equal(before[name], average[name]) for name in held)
    # Images are read from layers that start at zero: one step moves only the last of them.
    assert any(not torch.equal(before[name], after[name]) for name in held)
    said = runs.endings["thawed"].logs[0]
    assert "global, data.image: frozen until now, so the optimiser state starts at zero" in said
    assert "stage.gradient_scales.global=1: was 0 until now" in said
    sizes = [sum(file.stat().st_size for file in newest(run).glob("*.safetensors")) for run in (frozen, thawed)]
    count = sum(before[name].numel() for name in held)
    # Three of four values: two moments and the average.
    assert sizes[1] - sizes[0] == pytest.approx(12 * count, rel=0.01)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_leave_the_weights_beside_them_alone(runs: Runs) -> None:
    one, start = runs.weights("adapted"), runs.weights("whole")
    adapters = [name for name in one if is_adapter(name)]
    assert {layer_group(name) for name in adapters} == {"data.image", "context.text"}
    assert any(one[name].any() for name in adapters if name.endswith(".up"))
    kept = {name.replace(".parametrizations.weight.original", ".weight"): one[name] for name in {*one} - {*adapters}}
    assert kept.keys() == start.keys()
    assert all(torch.equal(kept[name], start[name]) for name in kept)
    index = Index.read(newest(runs.folder / "adapted"))
    trained = sum(layout.numel for layout in index.groups)
    assert trained < sum(tensor.numel() for tensor in start.values()) / 10


def test_an_export_of_adapters_holds_the_sum_and_is_sampled(runs: Runs, tmp_path: Path) -> None:
    run = runs.folder / "adapted"
    assert weights(["export", "safetensors", str(tmp_path / "mine"), str(run), "weights=model", "model=tiny"]) == 0
    exported, raw = open_weights_folder(tmp_path / "mine"), runs.weights("adapted")
    assert exported.keys() == runs.weights("whole").keys()
    moved = 0
    for name, found in exported.items():
        inside = name.removesuffix("weight") + "parametrizations.weight."
        if f"{inside}original" in raw:
            product = raw[f"{inside}0.up"] @ raw[f"{inside}0.down"]
            torch.testing.assert_close(found, raw[f"{inside}original"] + 3 * product.view_as(found), atol=0, rtol=0)
            moved += not torch.equal(found, raw[f"{inside}original"])
        else:
            assert torch.equal(found, raw[name])
    assert moved > 10
    images = []
    for number, source in enumerate((run, tmp_path / "mine")):
        words = [str(source), "a red circle", "weights=model", "steps=2", "resolution=32", "device=cpu"]
        assert sample([*words, f"output_dir={tmp_path}/{number}"]) == 0
        images.append((tmp_path / str(number) / "0000.png").read_bytes())
    pixels = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images]
    assert len(pixels[0]) > 100
    _, merged = open_weights("checkpoint", str(run), "ema")
    assert merged.keys() == exported.keys()


def test_adapters_of_another_size_are_refused(runs: Runs, capsys: Any) -> None:
    words = ["stage=stage3_four_flow", *overrides(runs.folder), *LORA, f"run_dir={runs.folder}/adapted", "lora.rank=3"]
    assert train([*words, f"stage.init_from={runs.folder}/whole"]) == 2
    assert f"error: lora.rank=3: run_dir={runs.folder}/adapted has 2; restore it, or" in capsys.readouterr().err
    words = [
        "stage=stage3_four_flow",
        *overrides(runs.folder),
        f"run_dir={runs.folder}/none",
        "lora.rank=3",
        "lora.targets=[to_x]",
    ]
    assert train([*words, f"stage.init_from={runs.folder}/whole"]) == 2
    assert "error: lora.targets=[to_x]: no linear layer or convolution of global" in capsys.readouterr().err


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_shows_what_frozen_groups_and_adapters_save(capsys: Any) -> None:
    phases = settings.phases(64, (32, 100))
    base = [
        *settings.TINY,
        "gpus=1",
        "stage=stage2_dual_flow",
        phases,
        "hardware.precision=bf16",
        "optimizer.schedule=linear",
    ]
    assert plan([*base, *FROZEN, "format=json"]) == 0
    frozen = json.loads(capsys.readouterr().out)
    with torch.device("meta"):
        sizes = Diffuser(load().model, ["data.image", "context.image", "context.text"])
    counts = {
        group: sum(parameter.numel() for parameter in parameters.values())
        for group, parameters in parameters_by_group(sizes).items()
    }
    held, trained = counts["global"] + counts["data.image"], counts["context.image"] + counts["context.text"]
    assert frozen["untrained_parameters"] == held
    assert sum(frozen["parameters"].values()) == trained
    expected = {"weights": 2, "masters": 4, "gradients": 4, "moments": 8, "ema": 4}
    assert {part: frozen["standing"][part] for part in expected} == {
        part: size * trained for part, size in expected.items()
    }
    assert frozen["standing"]["untrained"] == 2 * held
    assert frozen["checkpoint"] == 16 * trained + 4 * held
    assert frozen["phases"][0]["learning_rate"][1] == 0
    assert plan([*base, "lora.rank=2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "frozen layers" in shown
    assert f"{held + trained:,} of the diffuser kept as they are" in shown
    adapters = re.search(r"([\d,]+) trained parameters", shown)
    assert adapters is not None
    assert int(adapters[1].replace(",", "")) < (held + trained) / 10
