"""`vdtrain plan`: counts that come with the package, rates that were measured, days and money of a curriculum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.counts import CASES, CURRICULUM, config_of
from vdtrain.commands.plan import main
from vdtrain.config.compose import compose, options, to_object
from vdtrain.config.schema import PlanConfig
from vdtrain.planning.counts import FILE, Stored, counts, key
from vdtrain.planning.dry_run import DryRun, MicroBatchMemory
from vdtrain.planning.speed import is_named

GPUS = [name for name in options("hardware") if name != "cpu"]


@pytest.fixture
def no_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan in seconds counts nothing anew."""

    def refuse(config: Any) -> None:
        raise AssertionError(f"{config.stage.name} is counted anew")

    monkeypatch.setattr("vdtrain.planning.counts.DryRun", refuse)


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command for its JSON."""

    def run(*words: str) -> Any:
        assert main([*words, "format=json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def recounted(words: list[str], resolution: int, micro_batch: int) -> None:
    config = config_of(words)
    dry_run, stored = DryRun(config), counts(config)
    given, counted = stored.measure(resolution, micro_batch), dry_run.measure(resolution, micro_batch)
    assert (given.flops, given.encoding_flops, given.encoding) == (
        counted.flops,
        counted.encoding_flops,
        counted.encoding,
    )
    # A few kernels keep more of some sizes than of others, and the peak of a small micro-batch is elsewhere.
    assert given.kept == pytest.approx(counted.kept, rel=0.002)
    assert given.peak == pytest.approx(counted.peak, rel=0.01)
    assert (stored.frozen_bytes, stored.frozen_parameters) == (dry_run.frozen_bytes, dry_run.frozen_parameters)
    assert set(stored.unmeasured) == dry_run.unmeasured == set()


def test_every_stage_was_counted() -> None:
    """A change of the model or of a stage asks for `make counts`."""
    stored = json.loads(FILE.read_text())
    assert {key(config_of(words)): words for words in CASES} == {
        name: entry["settings"] for name, entry in stored.items()
    }
    # Neither the number of pairs nor paths, rates and precision of what a count does not depend on.
    words = ["stage=finetune_four_flow", "hardware=l40s", "stage.global_batch_size=96", "stage.learning_rate=1"]
    words += ["model.modalities.image.vae.weights=/elsewhere"]
    assert key(config_of(words)) == key(config_of(["stage=stage3_four_flow"]))
    assert key(config_of(["stage=stage3_four_flow", "hardware.precision=fp32"])) not in stored


def test_a_count_is_that_of_a_dry_run() -> None:
    recounted(CASES[0], 256, 8)


def test_a_size_that_was_not_counted_is_on_the_line_through_those_around_it() -> None:
    peaks = {1: 10, 2: 30, 4: 40, 32: 320, 64: 960}
    stored = Stored(0, 0, (), {64: {size: MicroBatchMemory(0, 0, peak, 0, 0) for size, peak in peaks.items()}})
    asked = {1: 10, 2: 30, 3: 35, 4: 40, 18: 180, 48: 640, 64: 960, 128: 2240}
    assert {size: stored.measure(64, size).peak for size in asked} == asked


@pytest.mark.slow
@pytest.mark.parametrize("words", CASES, ids=" ".join)
@pytest.mark.parametrize("resolution", [256, 512])
def test_every_count_is_that_of_a_dry_run(words: list[str], resolution: int) -> None:
    """Between two sizes that were counted."""
    recounted(words, resolution, 8)


@pytest.mark.parametrize("hardware", GPUS)
def test_a_curriculum_is_the_sum_of_its_stages(no_dry_run: None, planned: Callable[..., Any], hardware: str) -> None:
    made = planned("curriculum", f"hardware={hardware}", "gpus=64", "price_per_gpu_hour=2.5", "rate=null")
    assert [stage["stage"] for stage in made["stages"]] == list(CURRICULUM)
    times = [time for stage in made["stages"] for time in stage["times"]]
    assert len(times) == 6
    for total in ("days", "gpu_hours", "cost"):
        assert made[total] == pytest.approx(sum(time[total] for time in times))
        assert made[total] == pytest.approx(sum(stage[total] for stage in made["stages"]))
    assert made["gpu_hours"] == pytest.approx(made["days"] * 24 * 64)
    assert made["cost"] == pytest.approx(made["gpu_hours"] * 2.5)
    for stage in made["stages"]:
        assert stage["warnings"] == []
        for phase, time, rates in zip(stage["phases"], stage["times"], stage["rates"], strict=True):
            assert time["days"] == pytest.approx(phase["steps"] * time["seconds"] / 86_400)
            assert rates["share_of_peak"] == pytest.approx(rates["tflops"] / rates["peak_tflops"])
            assert 0.15 < rates["share_of_peak"] < 0.4
            assert "estimated in hardware=" in rates["source"]
            # No faster than its operations at that share.
            assert time["compute"] >= time["flops"] / 64 / (rates["tflops"] * 1e12) * 0.999


def test_a_plan_without_a_price_has_no_cost(no_dry_run: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curriculum"]) == 0
    shown = capsys.readouterr().out
    assert "GPU hours" in shown
    assert "cost" not in shown


def test_what_a_person_sees(no_dry_run: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["hardware=h200", "gpus=8", "price_per_gpu_hour=3", "rate=null"]
    assert main(["curriculum", *words]) == 0
    shown = capsys.readouterr().out
    assert all(stage in shown for stage in CURRICULUM)
    table = shown.partition("\nthe checkpoints")[0].splitlines()[2:]
    assert max(map(len, table)) <= 80
    assert "362 TFLOP/s a GPU, 37% of the data sheet's 989; estimated in hardware=h200" in shown
    total = shown.splitlines()[-1]
    assert total.startswith("in all ")
    assert total.endswith(" at 3 a GPU hour")
    # The same phase in the plan of its stage, and the scale of a pilot run in all.
    assert main(["stage=stage3_four_flow", *words]) == 0
    alone = capsys.readouterr().out
    assert "cost" in alone
    assert alone.splitlines()[-1].startswith("in all ")
    assert main(["curriculum", *words, "stage.samples_scale=0.01"]) == 0
    assert float(capsys.readouterr().out.splitlines()[-1].split()[2]) < 0.1


def result_of(name: str, tflops: float, **settings: Any) -> dict[str, Any]:
    """A result of `vdtrain bench` on a GPU."""
    hardware = {"device": "cuda", "name": name, "processes": 8, "threads": 8}
    config = to_object(compose("plan", ["stage=stage3_four_flow", "hardware=h200"]), PlanConfig)
    known = {"model": "versatile_diffusion", "precision": "bf16", "compile": "blocks", "channels_last": True}
    known |= {"activation_checkpointing": "none", "stage": config.stage.name, "flows": config.stage.flows}
    known |= {"resolution": 256, "latents": "inline", "micro_batch": 64, "micro_batches": 1, **settings}
    return {
        "settings": known,
        "hardware": hardware,
        "parts_ms": {"encode": 30.0, "forward": 20.0, "backward": 40.0, "exchange": 5.0},
        "rates": {"tflops": tflops, "memory": 4000.0, "link": 300.0},
    }


def test_the_nearest_result_on_this_hardware_is_taken(
    no_dry_run: None, planned: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    found = {
        "other_card": result_of("NVIDIA H100 80GB HBM3", 900.0),
        "other_code": result_of("NVIDIA H200", 800.0, compile="none"),
        "small": result_of("NVIDIA H200", 500.0),
        "large": result_of("NVIDIA H200", 600.0, resolution=512, micro_batch=16),
    }
    (folder / "together.json").write_text(json.dumps(found))
    (folder / "broken.json").write_text("{")
    (folder / "foreign.json").write_text("[1, 2]")
    words = ["stage=stage3_four_flow", "hardware=h200", "gpus=8", f"rate={folder}"]
    rates = planned(*words)["rates"]
    assert [each["tflops"] for each in rates] == [500.0, 600.0]
    assert [each["micro_batch_ms"] for each in rates] == [90.0, 90.0]
    for each, name in zip(rates, ("small", "large"), strict=True):
        assert each["source"].startswith("measured on 8 x NVIDIA H200: stage3_four_flow at ")
        assert each["source"].endswith(f"({folder}/together.json, {name})")
    # Flows to images alone are nearer to one flow to images than to all four, whatever else differs.
    found["to_images"] = result_of("NVIDIA H200", 700.0, flows=["text-to-image"], latents="cached", micro_batch=128)
    (folder / "together.json").write_text(json.dumps(found))
    assert [each["tflops"] for each in planned(*words)["rates"]] == [500.0, 600.0]
    assert [each["tflops"] for each in planned("stage=stage2_dual_flow", *words[1:])["rates"]] == [700.0, 600.0]
    # A micro-batch further away is not nearer.
    found["wide"] = result_of("NVIDIA H200", 550.0, micro_batch=1024)
    (folder / "together.json").write_text(json.dumps(found))
    assert [each["tflops"] for each in planned(*words)["rates"]] == [500.0, 600.0]
    # The launches of a micro-batch take no longer than all of it took.
    for known, expected in ((50.0, 50.0), (200.0, 90.0)):
        assert planned(*words, f"hardware.rates.micro_batch_ms={known}")["rates"][0]["micro_batch_ms"] == expected
    # Another card has no result there.
    assert "estimated" in planned(*words, "hardware=b200")["rates"][0]["source"]
    # A file that is named is taken as it is.
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(found["other_code"]))
    assert {each["tflops"] for each in planned(*words, f"rate={alone}")["rates"]} == {800.0}


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("a100_40gb", "NVIDIA A100-SXM4-40GB"),
        ("a100_80gb", "NVIDIA A100 80GB PCIe"),
        ("l40s", "NVIDIA L40S"),
        ("b200", "NVIDIA B200"),
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("h200", "NVIDIA H200"),
    ],
)
def test_a_preset_knows_its_card(preset: str, name: str) -> None:
    config = to_object(compose("plan", [f"hardware={preset}"]), PlanConfig)
    assert is_named(config.hardware, name)
    assert not is_named(config.hardware, "NVIDIA A100-SXM4-40GB" if preset != "a100_40gb" else "NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["curriculum", "stage=stage3_four_flow"], "every stage of a curriculum has its own"),
        (["curriculum", "curriculum=[]"], "curriculum=[]: names no stage"),
        (["curriculum", "curriculum=[stage9]"], "stage9"),
        (["curriculum", "gpus=12"], "error: stage1_single_flow: stage.global_batch_size=2048"),
        (["price_per_gpu_hour=-1"], "price_per_gpu_hour=-1"),
        (["rate=none/here"], "rate=none/here: "),
        (["hardware.rates.peak_tflops=0"], "hardware.rates.peak_tflops=0"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1, shown.err
    assert expected in shown.err
