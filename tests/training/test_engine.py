"""What the engine carries, averages, refuses and leaves behind."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.training.ranks import TIMEOUT_SECONDS
from tests.training.toy import (
    CHANGING_FLOWS,
    FLOWS,
    ZERO,
    RunOnRanks,
    Toy,
    difference,
    full_weights,
    gather,
    micro_batches,
    same_bits,
    settings,
    toy_groups,
    train_step,
)
from vdtrain.config.schema import SHARDED
from vdtrain.engine.adamw import PIECE, sum_of_squares
from vdtrain.engine.engine import Engine, ShardEMA
from vdtrain.run import distributed

TRAINED = ("global", "data.image", "context.text")


def cases(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    results: dict[str, Any] = {"words": exchange_words()}
    for stage in ZERO:
        results[f"carried_over-{stage}"] = carried_passengers(stage)
        results[f"ema-{stage}"] = averaged(stage)
        results[f"foreign-{stage}"] = foreign_weights(stage)
        results[f"twice-{stage}"] = one_module_in_two_engines(stage)
        results[f"converted-{stage}"] = converted_afterwards(stage)
        results[f"aligned-{stage}"] = first_addresses(stage)
    results["timeouts"] = timeouts()
    for stage in (0, SHARDED):
        results[f"order-{stage}"] = order_of_reductions(stage)
    report(results)


def exchange_words() -> dict[str, Any]:
    me = distributed.rank()
    return {
        "agree": [distributed.all_agree(True), distributed.all_agree(me != 0)],
        "gathered": distributed.gather_json({"rank": me, "text": "é" * (me + 1)}),
        "broadcast": distributed.broadcast_json({"from": me}, source=distributed.world_size() - 1),
    }


def carried_passengers(stage: int | str) -> dict[str, Any]:
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


def first_addresses(stage: int | str) -> dict[str, Any]:
    """Of each group's first weights and of the partitions that an update reads, to 16 bytes.

    A bias of odd size ends the first group.
    """
    module = Toy()
    groups = toy_groups(module)
    first = next(iter(groups))
    module.register_parameter("odd", nn.Parameter(torch.zeros(3)))
    groups[first] = {**groups[first], "odd": module.odd}
    engine = Engine(module, groups, settings(zero_stage=stage, precision="bf16"))
    results = {
        "odd": sum(parameter.numel() for parameter in groups[first].values()) % 8,
        "offsets": [next(iter(parameters.values())).data_ptr() % 16 for parameters in groups.values()],
    }
    if stage in (0, SHARDED):
        strategy = engine._strategy
        updated = [*strategy.masters, *strategy.gradients(), *(strategy.lowered() or ())]
        results["partitions"] = [buffer.data_ptr() % 16 for buffer in updated]
    engine.close()
    return results


def averaged(stage: int | str) -> dict[str, Any]:
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


def one_module_in_two_engines(stage: int | str) -> dict[str, Any]:
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


def foreign_weights(stage: int | str) -> str:
    module = Toy(seed=distributed.rank())
    return failure(lambda: Engine(module, toy_groups(module), settings(zero_stage=stage)).close())


def order_of_reductions(stage: int | str) -> list[list[str]]:
    """The groups whose reduction begins during a step's last backward, and those whose begins after it."""
    module = Toy()
    groups = toy_groups(module)
    engine = Engine(module, groups, settings(zero_stage=stage))
    started: list[list[str]] = [[], []]
    strategy: Any = engine._strategy
    reduce = strategy._reduce

    def noting(index: int) -> None:
        during = torch._C._current_graph_task_id() != -1
        started[not during].append(list(groups)[index])
        reduce(index)

    strategy._reduce = noting
    first, second = micro_batches(0, 2)
    engine.backward(engine(FLOWS, *first), last=False)
    engine.backward(engine(FLOWS[:1], *second), last=True)
    engine.step(1e-3)
    engine.close()
    return started


def converted_afterwards(stage: int | str) -> list[str]:
    """What a step says before and after one of its parameters is laid out anew."""
    module = Convolution()
    engine = Engine(module, {"global": dict(module.named_parameters())}, settings(zero_stage=stage))

    def step() -> None:
        engine.backward(engine(torch.ones(1, 2, 4, 4)).square().mean(), last=True)
        engine.step(1e-3)

    said = [failure(step)]
    module.to(memory_format=torch.channels_last)
    said.append(failure(step))
    engine.close()
    return said


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv = nn.Linear(4, 4), nn.Conv2d(2, 3, 3)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.conv(self.linear(image))
        return out


def timeouts() -> list[float]:
    """Time limits of the run's group and of the one that DeepSpeed uses, in seconds."""
    used: Any = importlib.import_module("deepspeed.utils.groups")
    groups = [dist.group.WORLD, used._get_data_parallel_group()]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@pytest.fixture(scope="module")
def results(run_on_ranks: RunOnRanks, tmp_path_factory: Any) -> list[dict[str, Any]]:
    return run_on_ranks(cases, 2, tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("stage", ZERO)
def test_passengers_are_kept_in_float32(results: list[dict[str, Any]], stage: int | str) -> None:
    for rank in results:
        found = rank[f"carried_over-{stage}"]
        assert found["held"]
        assert found["exact"]
        assert found["no_gradient"]
        assert found["groups"] == list(TRAINED)


@pytest.mark.parametrize("stage", ZERO)
def test_average_equals_the_formula_on_full_tensors(results: list[dict[str, Any]], stage: int | str) -> None:
    for rank in results:
        found = rank[f"ema-{stage}"]
        assert found["error"] < 1e-7
        assert found["distance"] > 1e-3


@pytest.mark.parametrize("stage", ZERO)
def test_different_starting_weights_are_refused_on_every_rank(results: list[dict[str, Any]], stage: int | str) -> None:
    for rank in results:
        assert "different weights" in rank[f"foreign-{stage}"]


@pytest.mark.parametrize("stage", ZERO)
def test_a_closed_engine_leaves_its_module_clean(results: list[dict[str, Any]], stage: int | str) -> None:
    for rank in results:
        assert rank[f"twice-{stage}"]["same"]


@pytest.mark.parametrize("stage", ZERO)
def test_a_step_needs_complete_gradients(results: list[dict[str, Any]], stage: int | str) -> None:
    for rank in results:
        assert "last=True" in rank[f"twice-{stage}"]["unfinished"]


@pytest.mark.parametrize("stage", [0, SHARDED])
def test_groups_are_reduced_as_soon_as_they_are_complete(results: list[dict[str, Any]], stage: int | str) -> None:
    for rank in results:
        assert rank[f"order-{stage}"] == [["data.image", "context.image", "global"], ["data.text", "context.text"]]


@pytest.mark.parametrize("stage", [0, SHARDED])
def test_buffers_and_partitions_begin_where_a_gpu_reads_them_fast(
    results: list[dict[str, Any]], stage: int | str
) -> None:
    for found in (rank[f"aligned-{stage}"] for rank in results):
        assert found["odd"]
        assert not any(found["offsets"])
        assert len(found["partitions"]) >= 4
        assert not any(found["partitions"])


@pytest.mark.parametrize("stage", ZERO)
def test_a_parameter_that_left_its_buffer_is_named(results: list[dict[str, Any]], stage: int | str) -> None:
    """Under ZeRO 0 it would keep its values without a word."""
    for rank in results:
        before, after = rank[f"converted-{stage}"]
        assert before == ""
        assert "parameter conv.weight has left the engine's buffer" in after


def test_every_group_of_processes_has_the_time_limit_of_the_run(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank["timeouts"] == [TIMEOUT_SECONDS, TIMEOUT_SECONDS]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("normal", torch.randn(300 * PIECE + 17, generator=torch.Generator().manual_seed(0))),
        ("huge and tiny", torch.cat([torch.tensor([1e18, -3e17]), torch.full((5 * PIECE,), 1e-15)])),
        ("tiny", torch.full((5 * PIECE,), 1e-15)),
        ("short", torch.tensor([3.0, -4.0])),
        ("empty", torch.zeros(0)),
        ("nan", torch.full((2 * PIECE,), torch.nan)),
        ("infinite", torch.cat([torch.ones(2 * PIECE), torch.tensor([-torch.inf])])),
    ],
)
def test_squares_summed_in_pieces_equal_those_in_float64(name: str, values: Tensor) -> None:
    found = sum_of_squares(values)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, values.double().square().sum(), rtol=2e-6, atol=0.0, equal_nan=True)
    assert torch.equal(found, sum_of_squares(values.clone())) or name == "nan"


def test_words_between_ranks(results: list[dict[str, Any]]) -> None:
    for rank in results:
        found = rank["words"]
        assert found["agree"] == [True, False]
        assert found["gathered"] == [{"rank": r, "text": "é" * (r + 1)} for r in range(len(results))]
        assert found["broadcast"] == {"from": len(results) - 1}


def test_needs_a_process_group() -> None:
    module = Toy()
    with pytest.raises(RuntimeError, match=r"distributed\.start"):
        Engine(module, toy_groups(module), settings())
