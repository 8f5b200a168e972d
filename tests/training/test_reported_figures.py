"""The figures that a run reports are those that it worked with: learning rates, averages, steps left out, samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.pairs import write_pairs
from tests.settings import TINY, phases
from vdtrain.checkpoint.format import Index
from vdtrain.commands.preflight import main as preflight
from vdtrain.commands.sample import main as sample
from vdtrain.commands.train import main as train
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.engine.adamw import FlatAdamW
from vdtrain.engine.engine import Engine, ShardEMA, StepReport
from vdtrain.planning.dry_run import DryRun
from vdtrain.tracking.metrics import read_metrics
from vdtrain.tracking.reporting import Meters, log_line
from vdtrain.tracking.speed import PARTS
from vdtrain.training.agreement import StepOutcome

BATCH, LOW, HIGH = 4, 6, 4
# Half of every phase; the rate rises over 32 samples of a whole run, and so over four steps here.
SETTINGS = [
    "stage=stage1_single_flow",
    *TINY,
    "stage.init_from=null",
    f"stage.global_batch_size={BATCH}",
    "hardware.micro_batch_size={32:4,64:4}",
    phases(BATCH, (32, 2 * LOW), (64, 2 * HIGH)),
    "stage.samples_scale=0.5",
    "optimizer.warmup_samples=32",
    "stage.gradient_scales={global:0.1,data:{image:0.5},context:{image:1.0}}",
    "log_every_steps=1",
    "checkpoint.every_steps=1000",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="module")
def applied(folder: Path) -> list[tuple[float, list[float]]]:
    """What every step of a run was told, and what its optimiser then took for each layer group."""
    manifest = write_pairs(folder / "data")
    told: list[float] = []
    taken: list[list[float]] = []
    step, update = Engine.step, FlatAdamW.update

    def watched_step(engine: Engine, learning_rate: float, measure: bool, ema: ShardEMA | None) -> StepReport:
        told.append(learning_rate)
        return step(engine, learning_rate, measure, ema)

    def watched_update(optimizer: FlatAdamW, gradients: Any, rates: Any, *rest: Any) -> None:
        taken.append(list(rates))
        update(optimizer, gradients, rates, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Engine, "step", watched_step)
        patched.setattr(FlatAdamW, "update", watched_update)
        assert train([*SETTINGS, f"data.manifest={manifest}", f"run_dir={folder}/run"]) == 0
    return list(zip(told, taken, strict=True))


def test_the_learning_rate_of_a_step_is_the_one_that_it_applied(
    folder: Path, applied: list[tuple[float, list[float]]]
) -> None:
    records = read_metrics(folder / "run")
    assert [record["step"] for record in records] == list(range(1, LOW + HIGH + 1))
    assert [record["learning_rate"] for record in records] == [rate for rate, _ in applied]
    assert [list(record["learning_rates"].values()) for record in records] == [rates for _, rates in applied]
    scales = {"global": 0.1, "data.image": 0.5, "context.image": 1.0}
    assert records[-1]["learning_rates"] == pytest.approx({name: 2e-3 * scale for name, scale in scales.items()})


def test_a_pilot_run_comes_to_its_learning_rate(folder: Path, applied: list[tuple[float, list[float]]]) -> None:
    """After as small a share of its samples as a whole run."""
    assert [rate / 2e-3 for rate, _ in applied] == pytest.approx([0.25, 0.5, 0.75] + [1.0] * (LOW + HIGH - 3))


def test_a_runs_speed_is_its_counted_operations_over_its_time(
    folder: Path, applied: list[tuple[float, list[float]]]
) -> None:
    """They are counted in the second step of each phase, and those of a dry run are the same but for the captions."""
    records = read_metrics(folder / "run")
    known = [record["tflops"] is not None for record in records]
    assert known == [False, *[True] * (LOW - 1), False, *[True] * (HIGH - 1)]
    config = to_object(compose("train", SETTINGS), TrainConfig)
    dry_run = DryRun(config)
    for record in (records[1], records[-1]):
        pair = dry_run.measure(record["resolution"], BATCH).flops / BATCH
        assert record["tflops"] * 1e12 / record["pairs_per_second"] == pytest.approx(pair, rel=0.02)
        # The peak is measured at the start, when other work may slow it down.
        assert record["tflops"] / record["peak_share"] == pytest.approx(records[1]["tflops"] / records[1]["peak_share"])
        assert record["peak_share"] > 0
        assert record["time_shares"].keys() == set(PARTS)
        assert 0.5 < sum(record["time_shares"].values()) <= 1
    assert "TFLOP/s (" in log_line(records[-1])
    assert "TFLOP/s (" not in log_line(records[0])
    assert ", backward " in log_line(records[-1])


def test_every_phase_has_an_average_of_its_own(folder: Path, applied: list[tuple[float, list[float]]]) -> None:
    updates = {
        step: Index.read(folder / "run" / "checkpoints" / f"step-{step:09d}").ema_updates for step in (LOW, LOW + HIGH)
    }
    assert updates == {LOW: LOW, LOW + HIGH: HIGH}


def test_a_stage_that_never_comes_to_its_learning_rate_is_warned_of(
    folder: Path, applied: list[tuple[float, list[float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*SETTINGS, f"data.manifest={folder}/data/manifest", f"run_dir={folder}/new", "ranks=1"]
    assert preflight([*own, "optimizer.warmup_samples=79"]) == 0
    assert "warmup_samples" not in capsys.readouterr().out
    assert preflight([*own, "optimizer.warmup_samples=81"]) == 0
    line = "warning: optimizer.warmup_samples=81: the stage has 40 samples and ends before the warm-up does"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "note", "taken"),
    [
        (["steps=3"], "steps=3: does not divide 1000; solver=ddim takes 3 steps, at timesteps 667, 334 ... 1; ", None),
        (["steps=7"], "steps=7: does not divide 1000; solver=ddim takes 8 steps, at timesteps 995, 853 ... 1; ", 8),
        (["steps=4"], None, None),
        (["steps=7", "solver=unipc"], None, None),
    ],
)
def test_a_number_of_steps_that_becomes_another_is_said(
    folder: Path,
    applied: list[tuple[float, list[float]]],
    settings: list[str],
    note: str | None,
    taken: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    own = [f"checkpoint={folder}/run", "flow=image-to-image", f"inputs=[{folder}/red.png]", "resolution=32"]
    assert sample([*own, f"output_dir={folder}/samples", *settings]) == 0
    printed = capsys.readouterr()
    (written,) = printed.out.split()
    lines = [line for line in printed.err.splitlines() if line.startswith("note: ")]
    # The samples of the case before are there.
    lines = [line for line in lines if "numbers go on" not in line]
    if note is None:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith(f"note: {note}steps=")
    kept = " ".join(str(value) for value in Image.open(written).info.values())
    assert (f'"steps_taken": {taken}' in kept) == (taken is not None)


def test_an_interval_whose_steps_were_all_left_out_has_no_norm() -> None:
    """0 would be the norm of a run that has stopped to learn."""
    interval = Meters(torch.device("cpu"), 1e12)
    interval.add(StepOutcome(1, {"text-to-image": float("nan")}, float("inf"), applied=False, stop=False))
    summary = interval.summary()
    assert (summary["loss"], summary["gradient_norm"]) == ({}, None)
    places = {"step": 1, "resolution": 32, "samples": 4, "total_samples": 8, "learning_rate": 1e-4}
    line = log_line({**places, **summary, "skipped": 1, "replaced": 0})
    assert "no step counted | grad - |" in line
    json.dumps(summary, allow_nan=False)
