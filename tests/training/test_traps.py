"""What DeepSpeed 0.19.8 does wrong, or by a default nobody asked for, when several flows share a step: a test each.

Every test would fail, in one process or two, if the engine fell into the trap. Stage 3 and offloading, where there is
no way around theirs, are refused by the configuration.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.toy import (
    FLOWS,
    LEARNING_RATE,
    ZERO,
    RunOnRanks,
    Toy,
    ToyFlow,
    device,
    difference,
    full_rows,
    full_weights,
    micro_batches,
    reference,
    settings,
    toy_groups,
    train_step,
)
from vdtrain.config.schema import SHARDED
from vdtrain.engine import strategies as engine_zero
from vdtrain.engine.deepspeed import deepspeed_configuration
from vdtrain.engine.engine import Engine, StepReport
from vdtrain.engine.flat import FIRST_MOMENT, SECOND_MOMENT
from vdtrain.run import distributed
from vdtrain.training.agreement import StepSync

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "communication.py"
# Each step leaves out layers of the one before.
ONE_FLOW_EACH: list[list[ToyFlow]] = [[flow] for flow in FLOWS]


def cases(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    results: dict[str, Any] = {"diverged": diverged()}
    for stage in ZERO:
        results[f"absent-{stage}"] = against_reference(stage, ONE_FLOW_EACH)
        results[f"backwards-{stage}"] = one_backward_per_flow(stage)
        results[f"clip-{stage}"] = against_reference(stage, [FLOWS] * 3, clip=0.0)
        results[f"moments-{stage}"] = moments(stage)
        results[f"traffic-{stage}"] = traffic(stage)
    results["overlapped"] = with_overlap()
    report(results)


def against_reference(stage: int | str, flows_of_steps: list[list[ToyFlow]], clip: float = 0.5) -> dict[str, Any]:
    plain, module = Toy(), Toy()
    norms, _ = reference(plain, flows_of_steps, clip=clip)
    engine = Engine(module, toy_groups(module), settings(zero_stage=stage, gradient_clip=clip))
    for step, flows in enumerate(flows_of_steps):
        train_step(engine, step, flows)
    error = difference(full_weights(engine), dict(plain.named_parameters()))
    engine.close()
    return {"error": error, "smallest_norm": min(norms)}


def one_backward_per_flow(stage: int | str) -> float:
    """Error after steps in which every flow has a backward of its own: the last one knows few of the layers."""
    plain, module = Toy(), Toy()
    reference(plain, [FLOWS] * 3)
    engine = Engine(module, toy_groups(module), settings(zero_stage=stage))
    for step in range(3):
        (parts,) = micro_batches(step, 1)
        for flow in FLOWS:
            engine.backward(engine([flow], *parts), last=flow == FLOWS[-1])
        engine.step(LEARNING_RATE)
    error = difference(full_weights(engine), dict(plain.named_parameters()))
    engine.close()
    return error


def with_overlap() -> float:
    """The same under ZeRO 1 with the reduction overlapped, which the engine's configuration forbids."""
    configuration = engine_zero.deepspeed_configuration
    overlapping = deepspeed_configuration(settings())
    overlapping["zero_optimization"]["overlap_comm"] = True
    engine_zero.deepspeed_configuration = lambda _: overlapping
    try:
        return one_backward_per_flow(1)
    finally:
        engine_zero.deepspeed_configuration = configuration


def traffic(stage: int | str) -> list[int]:
    """Elements reduced in a step of four flows and two micro-batches, of the gradient, and of it with its padding."""
    module = Toy()
    engine = Engine(module, toy_groups(module), settings(zero_stage=stage))
    spec = importlib.util.spec_from_file_location("communication", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    communication = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = communication
    spec.loader.exec_module(communication)
    batches, processes = micro_batches(0, 2), distributed.world_size()
    padded = sum(processes * each.layout.partition_size(processes) for each in engine.partitions())
    with communication.Traffic() as counted:
        for index, parts in enumerate(batches):
            engine.backward(engine(FLOWS, *parts), last=index == len(batches) - 1)
        engine.step(LEARNING_RATE)
    engine.close()
    return [counted.reduced // 4, sum(parameter.numel() for parameter in module.parameters()), padded]


def moments(stage: int | str) -> dict[str, Any]:
    """AdamW's averages in every layer group, beside plain PyTorch's."""
    plain, module = Toy(), Toy()
    _, optimizer = reference(plain, [FLOWS] * 2)
    engine = Engine(module, toy_groups(module), settings(zero_stage=stage))
    for step in range(2):
        train_step(engine, step, FLOWS)
    found = {}
    for kind in (FIRST_MOMENT, SECOND_MOMENT):
        expected = {name: optimizer.state[parameter][kind] for name, parameter in plain.named_parameters()}
        rows = full_rows(engine, kind)
        found[kind] = difference(rows, expected)
        found[f"{kind}-smallest"] = min(float(row.abs().max()) for row in rows.values())
    engine.close()
    return found


def diverged() -> dict[str, Any]:
    """What each process says if one of them is a flow or a step ahead."""
    here, last = device(), distributed.rank() == distributed.world_size() - 1
    report = StepReport(torch.ones((), device=here), torch.ones((), dtype=torch.bool, device=here))
    losses = {name: torch.tensor(float(distributed.rank()), device=here) for name in ("one", "two")}
    other = dict(reversed(losses.items()))
    found: dict[str, Any] = {}
    for name, step, ran in (
        ("same", 7, losses),
        ("order", 8, other if last else losses),
        ("left_out", 9, {"one": losses["one"]} if last else losses),
        ("step", 11 if last else 10, losses),
        ("part", 12, {"two": losses["two"]}),
    ):
        consensus = StepSync(["one", "two"], here)
        consensus.submit(step, ran, report, signal_number=15 if last else 0)
        try:
            outcome = consensus.collect()
            assert outcome is not None
            found[name] = [outcome.step, outcome.losses, outcome.gradient_norm, outcome.applied, outcome.stop]
        except distributed.SharedError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def results(run_on_ranks: RunOnRanks, tmp_path_factory: Any) -> list[dict[str, Any]]:
    return run_on_ranks(cases, 2, tmp_path_factory.mktemp("traps"))


@pytest.mark.parametrize("stage", ZERO)
def test_layers_that_a_step_leaves_out_get_no_gradient_of_the_step_before(
    results: list[dict[str, Any]], stage: int | str
) -> None:
    for rank in results:
        assert rank[f"absent-{stage}"]["error"] < 1e-6


@pytest.mark.parametrize("stage", ZERO)
def test_layers_that_the_last_backward_leaves_out_are_reduced_too(
    results: list[dict[str, Any]], stage: int | str
) -> None:
    for rank in results:
        assert rank[f"backwards-{stage}"] < 1e-6
        # Overlapped, they are not, and DeepSpeed says nothing.
        assert rank["overlapped"] > 1e-3
    assert deepspeed_configuration(settings(zero_stage=1))["zero_optimization"]["overlap_comm"] is False


@pytest.mark.parametrize(("stage", "times"), [(0, 1), (1, 1), (2, 2), (SHARDED, 1)])
def test_flows_of_a_step_are_reduced_together(results: list[dict[str, Any]], stage: int | str, times: int) -> None:
    """Once per step; under ZeRO 2, which keeps no gradients whole, once per micro-batch."""
    for rank in results:
        reduced, gradient, padded = rank[f"traffic-{stage}"]
        assert times * gradient <= reduced < 1.1 * times * padded


@pytest.mark.parametrize("stage", ZERO)
def test_without_clipping_nothing_is_clipped(results: list[dict[str, Any]], stage: int | str) -> None:
    """DeepSpeed clips at a norm of 1 unless told otherwise. The scale of a gradient cancels out of AdamW's updates when
    it is the same in all steps, and here it is not."""
    for rank in results:
        assert rank[f"clip-{stage}"]["smallest_norm"] > 1.5
        assert rank[f"clip-{stage}"]["error"] < 1e-6


@pytest.mark.parametrize("stage", ZERO)
def test_every_group_has_its_optimiser_state(results: list[dict[str, Any]], stage: int | str) -> None:
    for rank in results:
        found = rank[f"moments-{stage}"]
        for kind in (FIRST_MOMENT, SECOND_MOMENT):
            assert found[kind] < 1e-6
            assert found[f"{kind}-smallest"] > 1e-5


@pytest.mark.parametrize("case", ["order", "left_out", "step"])
def test_processes_that_go_different_ways_are_stopped(results: list[dict[str, Any]], case: str) -> None:
    """Their collectives would pair gradients of different layers, and end well."""
    steps = {"order": ("8", "8"), "left_out": ("9", "9"), "step": ("10", "11")}[case]
    for step, rank in zip(steps, results, strict=True):
        assert f"step {step}: the processes differ in their step or flows" in rank["diverged"][case]


def test_processes_that_go_together_share_what_they_know(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank["diverged"]["same"] == [7, {"one": 0.5, "two": 0.5}, 1.0, True, True]
        assert rank["diverged"]["part"] == [12, {"two": 0.5}, 1.0, True, True]


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_is_added_up_and_reduced_in_float32(stage: int | str) -> None:
    """By default, both are bf16. That the sums are exact is tested by test_oracle."""
    configuration = deepspeed_configuration(settings(zero_stage=stage, precision="bf16"))
    assert configuration["data_types"] == {"grad_accum_dtype": "fp32"}
    assert configuration["communication_data_type"] == "fp32"
