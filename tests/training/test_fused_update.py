"""One compiled pass over the buffers does what the separate passes do, within rounding, on one process and on two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.toy import (
    CHANGING_FLOWS,
    LEARNING_RATE,
    Toy,
    full_rows,
    gather,
    micro_batches,
    settings,
    toy_groups,
)
from vdtrain.config.schema import SHARDED
from vdtrain.engine import adamw
from vdtrain.engine.engine import Engine, ShardEMA, StepReport
from vdtrain.tracking.speed import OperatorCount

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed, for Inductor's CPU code")
STEPS, SKIPPED = 12, 5
# Of a buffer's norm. The same operations in another order differ by some 1e-7 a step.
BOUND = 1e-6


def made(fused: bool, decay: float | None) -> tuple[Engine, ShardEMA]:
    module = Toy()
    changes = {"zero_stage": SHARDED, "precision": "bf16", "fused": fused}
    engine = Engine(module.to(torch.float32), toy_groups(module), settings(**changes))
    return engine, ShardEMA(engine, decay)


def held(engine: Engine, ema: ShardEMA) -> dict[str, dict[str, Tensor]]:
    """Each kind of buffer by parameter, over all processes, and the module's weights."""
    rows = {kind: full_rows(engine, kind) for kind in ("master", "exp_avg", "exp_avg_sq")}
    rows["ema"] = gather(ema.buffers, [partition.layout for partition in engine.partitions()])
    return {**rows, "module": {name: each.clone() for name, each in engine.module.state_dict().items()}}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a parameter, as a share of its norm."""
    return max(float((one[name] - each).norm() / each.norm().clamp(min=1e-30)) for name, each in other.items())


def same(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> bool:
    return all(torch.equal(one[kind][name], each[name]) for kind, each in other.items() for name in each)


def cases(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    # So that these small buffers have whole parts and rests.
    adamw.WHOLE = 16
    # An error, where more forms than allowed would run eagerly. Here are six.
    torch._dynamo.config.fail_on_recompile_limit_hit, torch._dynamo.config.recompile_limit = True, 3
    report({str(decay): steps(decay) for decay in (None, 0.9)})


def steps(decay: float | None) -> dict[str, Any]:
    """What differs after steps of both forms on the same gradients; one of the steps has none that is finite."""
    (engine, ema), (plain, plain_ema) = made(True, decay), made(False, decay)
    start = held(engine, ema)
    engine.prepare_step(ema)
    found: dict[str, Any] = {
        "prepared": same(held(engine, ema), start),
        "lowered": engine._strategy.lowered() is not None,
    }
    for step in range(STEPS):
        before = held(engine, ema)
        one, other = (stepped(each, average, step) for each, average in ((engine, ema), (plain, plain_ema)))
        assert bool(one.applied) == bool(other.applied) == (step != SKIPPED)
        if step == SKIPPED:
            found["skipped"] = same(held(engine, ema), before)
        differences = {kind: apart(held(engine, ema)[kind], rows) for kind, rows in held(plain, plain_ema).items()}
        squares = (one.squares - other.squares).abs() / other.squares.clamp(min=1e-12)
        differences["squares"] = float(squares.max())
        for kind, difference in differences.items():
            found[kind] = max(found.get(kind, 0.0), difference)
    engine._optimizer.update_fused = None  # type: ignore[assignment, method-assign]
    with OperatorCount():
        found["counted"] = bool(stepped(engine, ema, STEPS).applied)
    stepped(plain, plain_ema, STEPS)
    found["counts"] = engine.group_steps == plain.group_steps and ema.updates == plain_ema.updates == STEPS
    found["cleared"] = all(not gradient.any() for gradient in engine._strategy.gradients())
    for each in (engine, plain):
        each.close()
    return found


def stepped(engine: Engine, ema: ShardEMA, step: int) -> StepReport:
    (parts,) = micro_batches(step, 1, engine.compute_dtype)
    loss = engine(CHANGING_FLOWS[step % len(CHANGING_FLOWS)], *parts)
    engine.backward(loss * (torch.inf if step == SKIPPED else 1.0), last=True)
    return engine.step(LEARNING_RATE / (1 + step), measure=step % 2 == 0, ema=ema)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_equals_the_separate_passes(run_on_ranks: Callable[..., Any], tmp_path: Path, ranks: int) -> None:
    (found, *_) = run_on_ranks(cases, ranks, tmp_path, timeout=300.0)
    for case in found.values():
        assert case["prepared"]
        assert case["lowered"]
        assert case["skipped"]
        assert case["counted"]
        assert case["counts"]
        assert case["cleared"]
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema", "squares"):
            assert case[kind] <= BOUND, (kind, case)
        # A weight between two bf16 numbers may fall on either side.
        assert case["module"] <= 2**-9, case
