"""The predicted memory of a stage against counted bytes at tiny size, and its totals at full size."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.toy import ZERO
from tests.training.toy import settings as engine_settings
from vdtrain.commands.plan import main
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import DEEPSPEED, SHARDED, TrainConfig
from vdtrain.config.validation import learning_rate, stage_flows
from vdtrain.diffusion.objective import Objective, StepRandom
from vdtrain.diffusion.schedule import Schedule
from vdtrain.engine.deepspeed import BUCKET_ELEMENTS, PRECISIONS
from vdtrain.engine.engine import Engine, ShardEMA
from vdtrain.engine.flat import GroupLayout, ParameterSlot
from vdtrain.flows import active_groups
from vdtrain.models.diffuser import Diffuser, parameters_by_group
from vdtrain.models.execution import checkpoint_activations
from vdtrain.models.frozen import build_frozen
from vdtrain.planning.dry_run import DryRun, LiveMemory
from vdtrain.planning.memory import (
    _largest,
    checkpoint_bytes,
    exchange_bytes,
    plan_stage,
    standing_memory,
    strategy,
    update_bytes,
)
from vdtrain.run import distributed

TINY = ["model=tiny", "data=shapes", "hardware=cpu", "tracking=none", "stage=stage3_four_flow"]
# Counters, sums of losses and the like.
SMALL = 1000


def tiny(*overrides: str) -> TrainConfig:
    return to_object(compose("train", [*TINY, *overrides]), TrainConfig)


# The code of each group of ranks; every function runs in new processes.


def on_one_rank(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    report({"cases": [standing(way, precision) for way in ZERO for precision in PRECISIONS]})


def on_two_ranks(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    on_one_rank(folder, report)


def standing(way: int | str, precision: str) -> dict[str, Any]:
    """Bytes of one engine: predicted, and counted in the middle of a step, while gradients exist."""
    ways = ["zero_stage=1", "exchange=sharded"] if way == SHARDED else [f"zero_stage={way}", "exchange=deepspeed"]
    config = tiny(*(f"hardware.{setting}" for setting in [*ways, f"precision={precision}"]))
    before = storages(everything())
    diffuser = Diffuser(config.model, active_groups(stage_flows(config)))
    groups = parameters_by_group(diffuser)
    deepspeed = strategy(config, distributed.world_size()) == DEEPSPEED
    layouts = [GroupLayout.of(*item, deepspeed=deepspeed) for item in groups.items()]
    predicted = standing_memory(config, layouts, distributed.world_size())
    chosen = engine_settings(zero_stage=way, precision=precision)
    engine = Engine(diffuser, groups, chosen)
    ema = ShardEMA(engine, 0.9)
    squares = torch.stack([parameter.float().square().sum() for parameter in diffuser.parameters()])
    engine.backward(squares.sum(), last=False)
    del squares
    # DeepSpeed may leave its bucket open until the step is complete.
    bucket = BUCKET_ELEMENTS * diffuser.global_layers[0].weight.element_size()
    counted = storages(everything())
    fresh = {key: size for key, size in counted.items() if key not in before and size != bucket}
    weights = storages(diffuser.parameters())
    partitions = engine.partitions()
    masters = storages(partition.master for partition in partitions)
    moments = storages(row for partition in partitions for row in (partition.exp_avg, partition.exp_avg_sq))
    averages = storages(ema.buffers)
    named = {**weights, **masters, **moments, **averages}
    squares = torch.stack([parameter.float().square().sum() for parameter in diffuser.parameters()])
    with LiveMemory() as reduction:
        engine.backward(squares.sum(), last=True)
    engine.step(1e-3)
    rows = [row for partition in partitions for row in partition.buffers.values()]
    written = sum(row.numel() * row.element_size() for row in [*rows, *ema.buffers])
    engine.close()
    return {
        "case": [way, precision],
        "predicted": vars(predicted),
        "weights": sum(weights.values()),
        "masters": sum(size for key, size in masters.items() if key not in weights),
        "moments": sum(moments.values()),
        "ema": sum(averages.values()),
        "gradients": sum(size for key, size in fresh.items() if key not in named),
        "reduction": [reduction.peak, update_bytes(config, layouts, distributed.world_size())],
        "checkpoint": checkpoint_bytes(config, layouts),
        "written": written,
    }


def everything() -> list[Tensor]:
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    return tensors + [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage, by its address."""
    kept = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in kept}


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_stands_from_step_to_step_is_what_the_engine_holds(
    run_on_ranks: Callable[..., Any], tmp_path: Path, ranks: int
) -> None:
    answers = run_on_ranks(on_one_rank if ranks == 1 else on_two_ranks, ranks, tmp_path, timeout=300.0)
    for case in answers[0]["cases"]:
        predicted = case["predicted"]
        for item in ("weights", "masters", "moments", "ema", "gradients"):
            assert case[item] == pytest.approx(predicted[item], abs=SMALL), (case["case"], item)
        if case["case"] == [1, "bf16"] and ranks > 1:
            counted, expected = case["reduction"]
            assert counted == pytest.approx(expected, abs=SMALL)
    for cases in zip(*(answer["cases"] for answer in answers), strict=True):
        assert sum(case["written"] for case in cases) == cases[0]["checkpoint"]


def real_micro_batch(config: TrainConfig, resolution: int, rows: int) -> tuple[int, int, int, int]:
    """A real forward and backward: bytes kept, peak, bytes that autograd saved, and the encoding's peak."""
    flows = stage_flows(config)
    diffuser = Diffuser(config.model, active_groups(flows))
    checkpoint_activations(diffuser, config.hardware.activation_checkpointing)
    for parameter in diffuser.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    frozen = build_frozen(config.model)
    objective = Objective(flows, Schedule(config.model.schedule), frozen, config.objective)
    rng = StepRandom("real", 0, config.stage.global_batch_size, slice(0, rows), torch.device("cpu"))
    images = torch.zeros(rows, 3, resolution, resolution, dtype=torch.uint8)
    with LiveMemory() as encoding, torch.no_grad():
        frozen.vaes["image"].encode(images)
    encoded = objective.encode({"image": images, "text": ["a red circle"] * rows}, resolution, rng)
    parameters = storages(diffuser.parameters())
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved.update(storages([tensor]))
        return tensor

    with LiveMemory() as memory, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = objective.total(objective.losses(diffuser, encoded, rng))
        kept = memory.now
        total.backward()
    return kept, memory.peak, sum(size for key, size in saved.items() if key not in parameters), encoding.peak


@pytest.fixture(scope="module")
def dry_runs() -> dict[str, DryRun]:
    modes = ("none", "context", "blocks")
    return {mode: DryRun(tiny(f"hardware.activation_checkpointing={mode}")) for mode in modes}


@pytest.mark.parametrize("mode", ["none", "context", "blocks"])
def test_a_micro_batch_takes_what_the_real_one_takes(dry_runs: dict[str, DryRun], mode: str) -> None:
    measured = dry_runs[mode].measure(32, 8)
    kept, peak, saved, encoding = real_micro_batch(dry_runs[mode].config, 32, 8)
    assert measured.kept == pytest.approx(kept, abs=SMALL)
    assert measured.peak == pytest.approx(peak, rel=0.005)
    assert measured.encoding == encoding
    if mode == "none":
        # Nearly all kept bytes are tensors that autograd saved; some of those are older.
        assert measured.kept == pytest.approx(saved, rel=0.02)
    assert dry_runs[mode].unmeasured == set()


def test_recomputing_takes_less(dry_runs: dict[str, DryRun]) -> None:
    none, context, blocks = (dry_run.measure(32, 8) for dry_run in dry_runs.values())
    assert blocks.kept < context.kept < none.kept
    assert blocks.peak < context.peak < none.peak
    assert blocks.encoding == none.encoding


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_largest_micro_batch_fits_and_the_next_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*TINY, "gpus=2", "stage.phases=[{resolution:32,samples:6400}]", "format=json"]
    # Half way between the peaks of 8 and of 16 pairs.
    peaks = []
    for micro_batch in (8, 16):
        made = json.loads(run(capsys, *settings, f"hardware.micro_batch_size={{32:{micro_batch}}}"))
        assert made["warnings"] == []
        assert made["phases"][0]["largest_micro_batch"] is None
        peaks.append(made["phases"][0]["peak"])
    memory = f"hardware.memory_gb={sum(peaks) / 2e9}"
    made = json.loads(run(capsys, *settings, memory))
    assert made["phases"][0]["largest_micro_batch"] == 8
    assert made["phases"][0]["steps"] == 100
    assert made["phases"][0]["micro_batches"] == 1
    (warning,) = made["warnings"]
    assert "hardware.micro_batch_size={32: 32} takes" in warning
    assert "hardware.micro_batch_size={32: 8} fits" in warning
    (warning,) = json.loads(run(capsys, *settings, "hardware.memory_gb=0.01"))["warnings"]
    assert "no micro-batch fits" in warning
    table = run(capsys, *(setting for setting in settings if "format" not in setting), memory)
    for part in ("weights", "averaged weights", "forward and backward", "peak", "32 x 1", "warning: "):
        assert part in table


def test_a_batch_of_one_micro_batch_has_its_largest(capsys: pytest.CaptureFixture[str]) -> None:
    """The search measures twice the micro-batch, which is more than the batch."""
    settings = [*TINY, "gpus=1", "stage.phases=[{resolution:32,samples:64}]", "stage.flows=[image-to-image]"]
    sizes = ["stage.global_batch_size=2", "hardware.micro_batch_size={32:2}", "hardware.memory_gb=16"]
    made = json.loads(run(capsys, *settings, *sizes, "format=json"))
    assert made["phases"][0]["largest_micro_batch"] == 2


def test_the_search_for_a_micro_batch_knows_divisors_and_lines() -> None:
    def peak_at(size: int) -> int:
        return 100 + 10 * size

    # 5 pairs would fit, and do not divide the batch.
    fits = {105: 0, 110: 1, 140: 4, 155: 4, 160: 6, 220: 12, 10**6: 12}
    for micro in (1, 4, 12):
        assert {memory: _largest(peak_at, micro, 12, memory) for memory in fits} == fits
    # Peaks that grow faster than the line: six pairs are on it, and take 136.
    assert _largest(lambda size: 100 + size**2, 1, 12, 130) == 4


def test_deepspeed_copies_groups_until_they_are_large() -> None:
    """ZeRO 1 in bf16 copies several groups together, and begins anew after 500 million elements."""
    million = 10**6
    sizes = [200 * million, 400 * million, 100 * million, 50 * million]
    layouts = [GroupLayout(str(size), (ParameterSlot("weight", (size,), 0),)) for size in sizes]
    ways = ("hardware.zero_stage=1", "hardware.exchange=deepspeed", "hardware.precision=bf16")
    assert update_bytes(tiny(*ways), layouts, 2) == 4 * 600 * million
    assert update_bytes(tiny(*ways), layouts[1:2], 2) == 0
    assert exchange_bytes(tiny(*ways), 2) == 0
    # Its bucket in bf16 and the float32 copy of it.
    assert exchange_bytes(tiny(*ways, "hardware.zero_stage=2"), 2) == 6 * BUCKET_ELEMENTS


def test_a_plan_is_the_sum_of_its_parts() -> None:
    words = ("lora.rank=2", "hardware.zero_stage=2", "hardware.precision=bf16", "optimizer.schedule=cosine")
    words += ("stage.phases=[{resolution:32,samples:6400},{resolution:64,samples:3200}]", "stage.flows=[text-to-text]")
    config = tiny(*words, "checkpoint.keep=3", "checkpoint.keep_every_steps=40", "optimizer.warmup_samples=640")
    made = plan_stage(config, 2)
    trained, others = sum(made.parameters.values()), made.untrained_parameters
    assert 0 < trained < others
    assert made.standing.untrained == 2 * others
    # Weights, two moments and averages; what is not trained is only kept.
    assert made.checkpoint == 16 * trained + 4 * others
    layouts = [GroupLayout("global", (ParameterSlot("weight", (trained,), 0),))]
    assert checkpoint_bytes(tiny("ema.enabled=false"), layouts) == 12 * trained
    # Of 150 steps three are kept beside the newest.
    assert made.checkpoints == 6 * made.checkpoint
    assert [phase.steps for phase in made.phases] == [100, 50]
    assert [phase.learning_rate for phase in made.phases] == [
        (learning_rate(config, 1), learning_rate(config, 100)),
        (learning_rate(config, 101), learning_rate(config, 150)),
    ]
    for phase in made.phases:
        assert phase.exchange == 6 * BUCKET_ELEMENTS
        parts = phase.measured.encoding, phase.measured.peak + phase.exchange, phase.update
        assert phase.peak == made.standing.total + max(parts)


@pytest.mark.slow
def test_full_size_is_planned_without_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["stage=stage3_four_flow", "hardware=h100", "gpus=8", "format=json"]
    settings += ["stage.phases=[{resolution:512,samples:6400000}]", "hardware.activation_checkpointing=blocks"]
    made = json.loads(run(capsys, *settings))
    parameters = 2_566_318_852
    assert sum(made["parameters"].values()) == parameters
    # Image VAE, text VAE and one CLIP; shared and tied weights count once.
    assert made["frozen_parameters"] == 83_653_863 + 241_599_744 + 427_616_513
    standing = made["standing"]
    for item, size in {"weights": 2, "masters": 0.5, "gradients": 4, "moments": 1, "ema": 0.5}.items():
        assert standing[item] == pytest.approx(size * parameters, rel=1e-6), item
    assert standing["frozen"] == pytest.approx(2 * made["frozen_parameters"], rel=1e-3)
    assert made["checkpoint"] == 16 * parameters
    assert made["checkpoints"] == 3 * made["checkpoint"]
    (phase,) = made["phases"]
    assert phase["steps"] == 12_500
    assert standing["weights"] < phase["peak"] < 40e9
    assert phase["largest_micro_batch"] == 64
    # The vocabularies that are missing here have stand-ins.
    assert not any("encoding by" in item for item in made["left_out"])
    # 6.3 TFLOP a pair at 512 pixels, and a forward pass of every block again.
    assert made["times"][0]["flops"] == pytest.approx(made["pairs_per_step"] * 7.5e12, rel=0.01)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("gpus=0", ["gpus=0", "at least 1"]),
        ("gpus=3", ["stage.global_batch_size=64", "3 processes"]),
        ("format=yaml", ["format=yaml", "table, json"]),
        ("hardware.memory_gb=0", ["hardware.memory_gb=0", "null"]),
        ("hardware.activation_checkpointing=levels", ["hardware.activation_checkpointing=levels", "blocks"]),
    ],
)
def test_a_mistake_is_one_line(setting: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "gpus=2", setting]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert all(part in shown.err for part in expected)
