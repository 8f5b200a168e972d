"""What the engine carries, averages, refuses and leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.toy import (
    CHANGING_FLOWS,
    FLOWS,
    RunOnRanks,
    Toy,
    difference,
    full_weights,
    gather,
    same_bits,
    settings,
    toy_groups,
    train_step,
)
from vdtrain.engine.engine import Engine, ShardEMA
from vdtrain.run import distributed

STAGES = (0, 1, 2)
TRAINED = ("global", "data.image", "context.text")


def cases(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    results: dict[str, Any] = {"words": exchange_words()}
    for stage in STAGES:
        results[f"carried_over-{stage}"] = carried_passengers(stage)
        results[f"ema-{stage}"] = averaged(stage)
        results[f"foreign-{stage}"] = foreign_weights(stage)
        results[f"twice-{stage}"] = one_module_in_two_engines(stage)
    report(results)


def exchange_words() -> dict[str, Any]:
    me = distributed.rank()
    return {
        "agree": [distributed.all_agree(True), distributed.all_agree(me != 0)],
        "gathered": distributed.gather_json({"rank": me, "text": "é" * (me + 1)}),
        "broadcast": distributed.broadcast_json({"from": me}, source=distributed.world_size() - 1),
    }


def carried_passengers(stage: int) -> dict[str, Any]:
    module, fresh = Toy(), dict(Toy().named_parameters())
    engine = Engine(module, toy_groups(module, TRAINED), settings(zero_stage=stage, precision="bf16"))
    train_step(engine, 0, [("image", "text")])
    trained = {name for parameters in toy_groups(module, TRAINED).values() for name in parameters}
    carried_over = engine.carried_over
    results = {
        "held": sorted(carried_over) == (sorted(set(fresh) - trained) if distributed.rank() == 0 else []),
        "exact": all(torch.equal(carried_over[name], fresh[name].cpu()) for name in carried_over),
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
    found = gather(ema.buffers, [partition.layout for partition in engine.partitions()])
    results = {"error": difference(found, expected), "distance": difference(found, full_weights(engine))}
    engine.close()
    return results


def one_module_in_two_engines(stage: int) -> dict[str, Any]:
    """A closed engine leaves nothing on its module that would act in the next."""
    flows, module, other = CHANGING_FLOWS, Toy(), Toy()
    changes = {"gradient_scale_mode": "gradient", "zero_stage": stage}
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


def foreign_weights(stage: int) -> str:
    module = Toy(seed=distributed.rank())
    return failure(lambda: Engine(module, toy_groups(module), settings(zero_stage=stage)).close())


@pytest.fixture(scope="module")
def results(run_on_ranks: RunOnRanks, tmp_path_factory: Any) -> list[dict[str, Any]]:
    return run_on_ranks(cases, 2, tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("stage", STAGES)
def test_passengers_are_kept_in_float32(results: list[dict[str, Any]], stage: int) -> None:
    for rank in results:
        found = rank[f"carried_over-{stage}"]
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


@pytest.mark.parametrize("stage", STAGES)
def test_different_starting_weights_are_refused_on_every_rank(results: list[dict[str, Any]], stage: int) -> None:
    for rank in results:
        assert "different weights" in rank[f"foreign-{stage}"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_closed_engine_leaves_its_module_clean(results: list[dict[str, Any]], stage: int) -> None:
    for rank in results:
        assert rank[f"twice-{stage}"]["same"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_needs_complete_gradients(results: list[dict[str, Any]], stage: int) -> None:
    for rank in results:
        assert "last=True" in rank[f"twice-{stage}"]["unfinished"]


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
