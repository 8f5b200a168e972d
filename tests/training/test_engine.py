"""The ZeRO engine against plain PyTorch on the concatenated batch, on one and two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from toy import (
    CHANGING_FLOWS,
    FLOWS,
    RunOnRanks,
    Toy,
    difference,
    full_weights,
    gather,
    micro_batches,
    reference,
    same_bits,
    settings,
    toy_groups,
    train_step,
)

from vdtrain.training import distributed
from vdtrain.training.ema import ShardEMA
from vdtrain.training.engine import Engine

STAGES = (0, 1, 2)
MODES = ("learning_rate", "gradient")
PRECISIONS = ("fp32", "bf16")
TRAINED = ("global", "data.image", "context.text")


def cases(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    results: dict[str, Any] = {"words": exchange_words()}
    for stage in STAGES:
        for mode in MODES:
            results[f"reference-{stage}-{mode}"] = against_reference(stage, mode)
        for precision in PRECISIONS:
            results[f"skip-{stage}-{precision}"] = skipped_step(stage, precision)
        results[f"bf16-{stage}"] = bf16_step(stage)
        results[f"passengers-{stage}"] = carried_passengers(stage)
        results[f"ema-{stage}"] = averaged(stage)
    results["foreign"] = foreign_weights()
    results["twice"] = one_module_in_two_engines()
    report(results)


def exchange_words() -> dict[str, Any]:
    me = distributed.rank()
    return {
        "agree": [distributed.all_agree(True), distributed.all_agree(me != 0)],
        "gathered": distributed.gather_json({"rank": me, "text": "é" * (me + 1)}),
        "broadcast": distributed.broadcast_json({"from": me}, source=distributed.world_size() - 1),
    }


def against_reference(stage: int, mode: str) -> dict[str, Any]:
    flows_of_steps = [*CHANGING_FLOWS, *CHANGING_FLOWS]
    plain = Toy()
    norms = reference(plain, flows_of_steps, mode)
    module = Toy()
    engine = Engine(module, toy_groups(module), settings(zero_stage=stage, gradient_scale_mode=mode))
    reports = [train_step(engine, step, flows)[1] for step, flows in enumerate(flows_of_steps)]
    expected = dict(plain.named_parameters())
    results = {
        "weights": difference(full_weights(engine), expected),
        "module": difference(dict(module.named_parameters()), expected),
        "moved": difference(dict(Toy().named_parameters()), expected),
        "norms": max(
            abs(float(report.gradient_norm) - norm) / norm for report, norm in zip(reports, norms, strict=True)
        ),
        "steps": engine.optimizer_steps,
    }
    engine.close()
    return results


def skipped_step(stage: int, precision: str) -> dict[str, Any]:
    module = Toy()
    engine = Engine(module, toy_groups(module), settings(zero_stage=stage, precision=precision))
    train_step(engine, 0, FLOWS)
    before = full_weights(engine)
    parts = micro_batches(1, 1, engine.compute_dtype)[0]
    # Only the last process meets the bad sample.
    factor = float("nan") if distributed.rank() == distributed.world_size() - 1 else 1.0
    engine.backward(engine(FLOWS, *parts) * factor, last=True)
    report = engine.step(1.0)
    kept = same_bits(before, full_weights(engine))
    _, after = train_step(engine, 2, FLOWS)
    moved = difference(before, full_weights(engine))
    engine.close()
    return {
        "applied": bool(report.applied),
        "norm": float(report.gradient_norm),
        "kept": kept,
        "next": bool(after.applied),
        "moved": moved,
    }


def bf16_step(stage: int) -> dict[str, Any]:
    """Many bf16 backwards in a step, whose exact sum is collected beside the engine."""
    module = Toy()
    groups = toy_groups(module)
    engine = Engine(module, groups, settings(zero_stage=stage, precision="bf16", gradient_clip=0.0))
    exact_start = same_bits(full_weights(engine), dict(Toy().named_parameters()))
    exact = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in module.named_parameters()}
    hooks = [p.register_hook(collector(exact[name])) for name, p in module.named_parameters()]
    count = 4
    for index, parts in enumerate(micro_batches(0, count, torch.bfloat16)):
        engine.backward(engine(FLOWS, *parts) / count, last=index == count - 1)
    for hook in hooks:
        hook.remove()
    squares = 0.0
    for gradient in exact.values():
        dist.all_reduce(gradient)
        squares += float((gradient / distributed.world_size()).square().sum())
    report = engine.step(1e-2)
    weights = full_weights(engine)
    results = {
        "exact_start": exact_start,
        "dtype": str(engine.partitions()[0].master.dtype),
        "norm_error": abs(float(report.gradient_norm) / squares**0.5 - 1.0),
        "finer_than_bf16": not same_bits(weights, {name: w.bfloat16().float() for name, w in weights.items()}),
        "module": same_bits(
            dict(module.named_parameters()), {name: weights[name].bfloat16() for name, _ in module.named_parameters()}
        ),
    }
    engine.close()
    return results


def collector(total: Tensor) -> Callable[[Tensor], None]:
    def add(gradient: Tensor) -> None:
        total.add_(gradient.double())

    return add


def carried_passengers(stage: int) -> dict[str, Any]:
    module, fresh = Toy(), dict(Toy().named_parameters())
    engine = Engine(module, toy_groups(module, TRAINED), settings(zero_stage=stage, precision="bf16"))
    train_step(engine, 0, [("image", "text")])
    trained = {name for parameters in toy_groups(module, TRAINED).values() for name in parameters}
    passengers = engine.passengers
    results = {
        "held": sorted(passengers) == (sorted(set(fresh) - trained) if distributed.rank() == 0 else []),
        "exact": all(torch.equal(passengers[name], fresh[name]) for name in passengers),
        "no_gradient": all(p.requires_grad == (name in trained) for name, p in module.named_parameters()),
        "groups": [partition.layout.group for partition in engine.partitions()],
    }
    engine.close()
    return results


def averaged(stage: int) -> dict[str, Any]:
    decay, module = 0.3, Toy()
    engine = Engine(module, toy_groups(module), settings(zero_stage=stage))
    ema = ShardEMA(engine, decay)
    expected = full_weights(engine)
    for step in range(5):
        train_step(engine, step, FLOWS)
        ema.update()
        keep = min(decay, (2 + step) / (11 + step))
        for name, weight in full_weights(engine).items():
            expected[name] = keep * expected[name] + (1 - keep) * weight
    found = gather(ema.rows, [partition.layout for partition in engine.partitions()])
    results = {"error": difference(found, expected), "distance": difference(found, full_weights(engine))}
    engine.close()
    return results


def one_module_in_two_engines() -> dict[str, Any]:
    """A closed engine leaves nothing on its module that would act in the next."""
    flows, module, other = CHANGING_FLOWS, Toy(), Toy()
    changes = {"gradient_scale_mode": "gradient", "zero_stage": 2}
    Engine(module, toy_groups(module), settings(**changes)).close()
    weights = []
    for each in (module, other):
        engine = Engine(each, toy_groups(each), settings(**changes))
        for step in range(len(flows)):
            train_step(engine, step, flows[step])
        weights.append(full_weights(engine))
        unfinished = failure(lambda engine=engine: engine.step(1.0))
        engine.close()
    return {"same": same_bits(*weights), "unfinished": unfinished}


def failure(action: Callable[[], Any]) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return ""


def foreign_weights() -> str:
    module = Toy(seed=distributed.rank())
    return failure(lambda: Engine(module, toy_groups(module), settings()).close())


@pytest.fixture(scope="module", params=[1, 2])
def results(request: pytest.FixtureRequest, run_on_ranks: RunOnRanks, tmp_path_factory: Any) -> list[dict[str, Any]]:
    return run_on_ranks(cases, request.param, tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_equals_plain_pytorch(results: list[dict[str, Any]], stage: int, mode: str) -> None:
    for rank in results:
        found = rank[f"reference-{stage}-{mode}"]
        assert found["moved"] > 1e-3
        assert found["weights"] < 1e-6
        assert found["module"] < 1e-6
        assert found["norms"] < 1e-5
        assert found["steps"] == 2 * len(CHANGING_FLOWS)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(
    results: list[dict[str, Any]], stage: int, precision: str
) -> None:
    for rank in results:
        found = rank[f"skip-{stage}-{precision}"]
        assert not found["applied"]
        assert found["norm"] == float("inf")
        assert found["kept"]
        assert found["next"]
        assert 0 < found["moved"] < 1


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_keeps_exact_masters_and_sums(results: list[dict[str, Any]], stage: int) -> None:
    for rank in results:
        found = rank[f"bf16-{stage}"]
        assert found["exact_start"]
        assert found["dtype"] == "torch.float32"
        assert found["norm_error"] < 1e-6
        assert found["finer_than_bf16"]
        assert found["module"]


@pytest.mark.parametrize("stage", STAGES)
def test_passengers_are_kept_in_float32(results: list[dict[str, Any]], stage: int) -> None:
    for rank in results:
        found = rank[f"passengers-{stage}"]
        assert found["held"]
        assert found["exact"]
        assert found["no_gradient"]
        assert found["groups"] == list(TRAINED)


@pytest.mark.parametrize("stage", STAGES)
def test_average_equals_the_formula_on_full_tensors(results: list[dict[str, Any]], stage: int) -> None:
    for rank in results:
        found = rank[f"ema-{stage}"]
        assert found["error"] < 1e-7
        assert found["distance"] > 1e-3


def test_different_starting_weights_are_refused_on_every_rank(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert ("different weights" in rank["foreign"]) == (len(results) > 1)


def test_a_closed_engine_leaves_its_module_clean(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank["twice"]["same"]


def test_a_step_needs_complete_gradients(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert "last=True" in rank["twice"]["unfinished"]


def test_words_between_ranks(results: list[dict[str, Any]]) -> None:
    for rank in results:
        found = rank["words"]
        assert found["agree"] == [True, False]
        assert found["gathered"] == [{"rank": r, "text": "é" * (r + 1)} for r in range(len(results))]
        assert found["broadcast"] == {"from": len(results) - 1}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"zero_stage": 3}, "hardware.zero_stage"),
        ({"precision": "fp16"}, "hardware.precision"),
        ({"gradient_scale_mode": "loss"}, "stage.gradient_scale_mode"),
    ],
)
def test_unsupported_settings_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        settings(**changes)


def test_needs_a_process_group() -> None:
    module = Toy()
    with pytest.raises(RuntimeError, match=r"distributed\.start"):
        Engine(module, toy_groups(module), settings())
