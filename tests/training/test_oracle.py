"""The engine against plain PyTorch on the concatenated batch, and bf16 against exact sums: 1, 2 and 4 processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.training.toy import (
    CHANGING_FLOWS,
    FLOWS,
    ZERO,
    RunOnRanks,
    Toy,
    ToyFlow,
    device,
    difference,
    full_rows,
    full_weights,
    micro_batches,
    reduced_gradients,
    reference,
    same_bits,
    settings,
    toy_groups,
    train_step,
)
from vdtrain.engine.engine import Engine, StepReport
from vdtrain.engine.flat import FIRST_MOMENT
from vdtrain.run import distributed
from vdtrain.training.agreement import StepSync

MODES = ("learning_rate", "gradient")


def cases(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    results: dict[str, Any] = {}
    for stage in ZERO:
        for mode in MODES:
            results[f"reference-{stage}-{mode}"] = against_reference(stage, mode)
        results[f"bf16-{stage}"] = bf16_steps(stage)
    report(results)


def against_reference(stage: int | str, mode: str) -> dict[str, Any]:
    flows_of_steps = [*CHANGING_FLOWS, *CHANGING_FLOWS]
    plain, meters = Toy(), list[dict[str, list[float]]]()
    norms, _ = reference(plain, flows_of_steps, mode, meters=meters)
    module, unmeasured = Toy(), Toy()
    engine = Engine(module, toy_groups(module), settings(zero_stage=stage, gradient_scale_mode=mode))
    reports = [train_step(engine, step, flows, measure=True)[1] for step, flows in enumerate(flows_of_steps)]
    other = Engine(unmeasured, toy_groups(unmeasured), settings(zero_stage=stage, gradient_scale_mode=mode))
    for step, flows in enumerate(flows_of_steps):
        train_step(other, step, flows)
    found_norms = [float(report.gradient_norm) for report in reports]
    expected = dict(plain.named_parameters())
    results = {
        "weights": difference(full_weights(engine), expected),
        "module": difference(dict(engine.module.named_parameters()), expected),
        "moved": difference(dict(Toy().named_parameters()), expected),
        "norms": max(abs(found - norm) / norm for found, norm in zip(found_norms, norms, strict=True)),
        "steps": max(engine.group_steps.values()),
        "measuring_changes_nothing": same_bits(full_weights(engine), full_weights(other)),
        **measured(engine, reports, meters),
    }
    engine.close()
    other.close()
    return results


def measured(engine: Engine, reports: list[StepReport], meters: list[dict[str, list[float]]]) -> dict[str, Any]:
    """The meters of the layer groups as every process receives them, beside those of plain PyTorch."""
    sync = StepSync(["all"], device(), engine.groups)
    errors: dict[str, list[float]] = {"group_norms": [], "update_ratios": [], "squares": []}
    seen = []
    for step, (report, expected) in enumerate(zip(reports, meters, strict=True)):
        sync.submit(step, {"all": report.gradient_norm}, report, 0, seconds=1.0 + distributed.rank())
        outcome = sync.collect()
        assert outcome is not None
        assert outcome.gradient_norms.keys() == outcome.update_ratios.keys() == expected.keys()
        for group, (norm, ratio) in expected.items():
            # Groups that the step left out have no gradient.
            errors["group_norms"].append(abs(outcome.gradient_norms[group] - norm) / (norm or 1.0))
            errors["update_ratios"].append(abs(outcome.update_ratios[group] - ratio) / ratio)
        total = sum(norm**2 for norm in outcome.gradient_norms.values()) ** 0.5
        errors["squares"].append(abs(total - outcome.gradient_norm) / total)
        seen.append([outcome.gradient_norms, outcome.update_ratios, outcome.seconds])
    same = all(each == seen for each in distributed.gather_json(seen))
    return {name: max(each) for name, each in errors.items()} | {"same_on_all": same, "seconds": seen[-1][-1]}


def bf16_steps(stage: int | str) -> dict[str, Any]:
    """Two steps of several bf16 backwards each, the second without some layers, beside their exact sums."""
    module = Toy()
    engine = Engine(module, toy_groups(module), settings(zero_stage=stage, precision="bf16", gradient_clip=0.0))
    exact_start = same_bits(full_weights(engine), dict(Toy().named_parameters()))
    errors, norm_errors = [], []
    for step, flows in enumerate((FLOWS, FLOWS[:1])):
        before = full_rows(engine, FIRST_MOMENT)
        exact = exact_gradients(engine, module, step, flows)
        norm = sum(float(gradient.square().sum()) for gradient in exact.values()) ** 0.5
        norm_errors.append(abs(float(engine.step(1e-2).gradient_norm) / norm - 1.0))
        reduced = reduced_gradients(engine, before)
        # Of the second step, the first moments hold a tenth beside nine tenths of the first step's.
        floor = max(float(moment.norm()) for moment in before.values())
        errors += [
            float((reduced[name] - gradient).norm() / max(float(gradient.norm()), floor))
            for name, gradient in exact.items()
        ]
    weights = full_weights(engine)
    results = {
        "exact_start": exact_start,
        "dtype": str(engine.partitions()[0].master.dtype),
        "gradients": max(errors),
        "norms": max(norm_errors),
        "finer_than_bf16": not same_bits(weights, {name: w.bfloat16().float() for name, w in weights.items()}),
        "module": same_bits(
            dict(engine.module.named_parameters()),
            {name: weights[name].bfloat16() for name, _ in module.named_parameters()},
        ),
    }
    engine.close()
    return results


def exact_gradients(engine: Engine, module: Toy, step: int, flows: list[ToyFlow]) -> dict[str, Tensor]:
    """Run a step's backwards; the mean over processes of what each gave in bf16, added up in float64, on the CPU."""
    exact = {name: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for name, p in module.named_parameters()}
    hooks = [p.register_hook(collector(exact[name])) for name, p in module.named_parameters()]
    batches = micro_batches(step, 4, torch.bfloat16)
    for index, parts in enumerate(batches):
        engine.backward(engine(flows, *parts) / len(batches), last=index == len(batches) - 1)
    for hook in hooks:
        hook.remove()
    for gradient in exact.values():
        dist.all_reduce(gradient)
    return {name: (gradient / distributed.world_size()).cpu() for name, gradient in exact.items()}


def collector(total: Tensor) -> Callable[[Tensor], None]:
    def add(gradient: Tensor) -> None:
        total.add_(gradient.double())

    return add


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest, run_on_ranks: RunOnRanks, tmp_path_factory: Any) -> list[dict[str, Any]]:
    return run_on_ranks(cases, request.param, tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", ZERO)
def test_equals_plain_pytorch(results: list[dict[str, Any]], stage: int | str, mode: str) -> None:
    for rank in results:
        found = rank[f"reference-{stage}-{mode}"]
        assert found["moved"] > 1e-3
        assert found["weights"] < 1e-6
        assert found["module"] < 1e-6
        assert found["norms"] < 1e-5
        assert found["steps"] == 2 * len(CHANGING_FLOWS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", ZERO)
def test_meters_of_groups_equal_plain_pytorch(results: list[dict[str, Any]], stage: int | str, mode: str) -> None:
    """A weight of order 1 is rounded to 6e-8, and an update here is of order 1e-3: the plain ratio errs by 6e-5."""
    for rank in results:
        found = rank[f"reference-{stage}-{mode}"]
        assert found["group_norms"] < 1e-5
        assert found["update_ratios"] < 1e-4
        assert found["squares"] < 1e-12
        assert found["same_on_all"]
        assert found["seconds"] == [1.0 + number for number in range(len(results))]
        assert found["measuring_changes_nothing"]


@pytest.mark.parametrize("stage", ZERO)
def test_bf16_keeps_exact_masters_and_sums(results: list[dict[str, Any]], stage: int | str) -> None:
    for rank in results:
        found = rank[f"bf16-{stage}"]
        assert found["exact_start"]
        assert found["dtype"] == "torch.float32"
        assert found["gradients"] < 1e-6
        assert found["norms"] < 1e-6
        assert found["finer_than_bf16"]
        assert found["module"]
