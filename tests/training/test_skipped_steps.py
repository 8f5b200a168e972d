"""Steps whose loss or gradient is not finite: left out by all processes, every bit kept, no device waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pairs import write_pairs
from tests.settings import TINY, phases
from tests.training.forks import Case, run_cases
from tests.training.toy import (
    FLOWS,
    ZERO,
    RunOnRanks,
    Toy,
    device,
    difference,
    full_rows,
    micro_batches,
    same_bits,
    settings,
    toy_groups,
    train_step,
)
from vdtrain.data.stream import PairStream
from vdtrain.engine.engine import Engine, ShardEMA, StepReport
from vdtrain.engine.flat import FIRST_MOMENT, MASTER, SECOND_MOMENT
from vdtrain.run import distributed
from vdtrain.run.distributed import SharedError
from vdtrain.tracking.metrics import read_metrics
from vdtrain.tracking.reporting import Meters
from vdtrain.training.agreement import NAMED_CHARACTERS, BadSteps, StepOutcome, StepSync, Tried

PRECISIONS = ("fp32", "bf16")
KINDS = (MASTER, FIRST_MOMENT, SECOND_MOMENT)
HARMS = ("loss is nan", "only the loss is infinite", "one gradient is infinite", "gradient has no square")


def build(stage: int | str, precision: str) -> tuple[Engine, Toy]:
    module = Toy()
    return Engine(module, toy_groups(module), settings(zero_stage=stage, precision=precision)), module


def harmed_step(engine: Engine, module: Toy, harm: str) -> StepReport:
    """A step in which the last process meets `harm` in its first micro-batch."""
    weight = next(iter(module.parameters()))
    batches = micro_batches(1, 2, engine.compute_dtype)
    for index, parts in enumerate(batches):
        harmed = index == 0 and distributed.rank() == distributed.world_size() - 1
        loss = engine(FLOWS, *parts)
        if harmed and harm == HARMS[0]:
            loss = loss * float("nan")
        if harmed and harm == HARMS[1]:
            loss = loss + float("inf")
        with _gradient_times(weight, {HARMS[2]: float("inf"), HARMS[3]: 1e25}.get(harm, 1.0) if harmed else 1.0):
            engine.backward(loss, last=index == len(batches) - 1)
    return engine.step(1.0)


@contextlib.contextmanager
def _gradient_times(parameter: nn.Parameter, factor: float) -> Iterator[None]:
    hook = parameter.register_hook(lambda gradient: gradient * factor)
    yield
    hook.remove()


def state(engine: Engine, module: Toy) -> dict[str, Tensor]:
    """Everything that a step changes, whole, on the CPU."""
    rows = {f"{kind}/{name}": row for kind in KINDS for name, row in full_rows(engine, kind).items()}
    weights = {f"module/{name}": weight.detach().cpu().clone() for name, weight in engine.module.named_parameters()}
    return {**rows, **weights, "steps": torch.tensor(max(engine.group_steps.values()))}


def two_ranks(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    results: dict[str, Any] = {}
    for stage in ZERO:
        for precision in PRECISIONS:
            results[f"skip-{stage}-{precision}"] = skipped_steps(stage, precision, folder)
            results[f"waits-{stage}-{precision}"] = waits(stage, precision)
    report(results)


def skipped_steps(stage: int | str, precision: str, folder: Path) -> dict[str, Any]:
    """A run with bad steps in it, beside one without; its end is kept for the run that goes on with it."""
    (engine, module), (other, other_module) = build(stage, precision), build(stage, precision)
    ema, other_ema = ShardEMA(engine, 0.5), ShardEMA(other, 0.5)
    found: dict[str, Any] = {"kept": [], "applied": [], "norms": []}
    ema.update(train_step(engine, 0, FLOWS)[1].applied)
    for harm in HARMS:
        before = state(engine, module)
        done = harmed_step(engine, module, harm)
        ema.update(done.applied)
        found["kept"].append(same_bits(before, state(engine, module)))
        found["applied"].append(bool(done.applied))
        found["norms"].append(float(done.gradient_norm))
    _, after = train_step(engine, 2, FLOWS)
    ema.update(after.applied)
    for step in (0, 2):
        other_ema.update(train_step(other, step, FLOWS)[1].applied)
    found["averaged"] = ema.updates == 2 and all(map(torch.equal, ema.buffers, other_ema.buffers))
    found["next"] = bool(after.applied)
    found["as_if_they_had_not_been"] = same_bits(state(engine, module), state(other, other_module))
    end = state(engine, module)
    train_step(engine, 3, FLOWS)
    later = state(engine, module)
    if distributed.rank() == 0:
        save_file(end, folder / f"{stage}-{precision}.safetensors")
        save_file(later, folder / f"{stage}-{precision}-later.safetensors")
    distributed.barrier()
    engine.close()
    other.close()
    return found


class Waits(TorchDispatchMode):
    """Notes every operation that hands a tensor's value to Python, for which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def waits(stage: int | str, precision: str) -> dict[str, list[str]]:
    """What waits for the device in a good and in a bad step, and in what is asked of them afterwards."""
    engine, module = build(stage, precision)
    consensus, ema = StepSync(["all"], device()), ShardEMA(engine, 0.5)
    found = {}
    for step, harm in enumerate(("none", HARMS[0])):
        with Waits() as mode:
            done = harmed_step(engine, module, harm)
            ema.update(done.applied)
            consensus.submit(step, {"all": done.gradient_norm}, done, signal_number=0)
        found[harm] = list(mode.seen)
        consensus.collect()
    with Waits() as mode:
        bool(done.applied)
    found["asked"] = list(mode.seen)
    engine.close()
    return found


def one_rank(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    results: dict[str, Any] = {}
    for stage in ZERO:
        for precision in PRECISIONS:
            results[f"skip-{stage}-{precision}"] = taken_up(stage, precision, folder)
    report(results)


def taken_up(stage: int | str, precision: str, folder: Path) -> dict[str, Any]:
    """Take up, alone and in the next ZeRO stage, what two processes left; then a bad step and a good one."""
    saved = load_file(folder / f"{stage}-{precision}.safetensors")
    engine, module = build(ZERO[ZERO.index(stage) - 1], precision)
    layouts = {partition.layout.group: partition.layout for partition in engine.partitions()}

    def read(group: str, kind: str, start: int, stop: int) -> Tensor:
        return torch.cat([saved[f"{kind}/{slot.name}"].reshape(-1) for slot in layouts[group].slots])[start:stop]

    engine.load_partitions(read, dict.fromkeys(layouts, int(saved["steps"])))
    loaded = same_bits(state(engine, module), saved)
    done = harmed_step(engine, module, HARMS[0])
    kept = same_bits(state(engine, module), saved)
    train_step(engine, 3, FLOWS)
    error = difference(state(engine, module), load_file(folder / f"{stage}-{precision}-later.safetensors"))
    engine.close()
    return {"loaded": loaded, "applied": bool(done.applied), "kept": kept, "error": error}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("skipped")


@pytest.fixture(scope="module")
def two(run_on_ranks: RunOnRanks, folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks(two_ranks, 2, folder)


@pytest.fixture(scope="module")
def afterwards(run_on_ranks: RunOnRanks, folder: Path, two: list[dict[str, Any]]) -> dict[str, Any]:
    return run_on_ranks(one_rank, 1, folder)[0]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", ZERO)
def test_what_one_process_meets_leaves_the_step_out_on_all(
    two: list[dict[str, Any]], stage: int | str, precision: str
) -> None:
    for rank in two:
        found = rank[f"skip-{stage}-{precision}"]
        assert found["kept"] == [True] * len(HARMS)
        assert found["applied"] == [False] * len(HARMS)
        assert found["norms"] == [float("inf")] * len(HARMS)
        assert found["next"]
        assert found["as_if_they_had_not_been"]
        assert found["averaged"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", ZERO)
def test_another_number_of_processes_takes_it_up(afterwards: dict[str, Any], stage: int | str, precision: str) -> None:
    found = afterwards[f"skip-{stage}-{precision}"]
    assert found["loaded"]
    assert not found["applied"]
    assert found["kept"]
    # In bf16 the gradients of other micro-batches are rounded otherwise.
    assert found["error"] < (1e-6 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", ZERO)
def test_nothing_in_a_step_waits_for_the_device(two: list[dict[str, Any]], stage: int | str, precision: str) -> None:
    for rank in two:
        found = rank[f"waits-{stage}-{precision}"]
        assert found["none"] == []
        assert found[HARMS[0]] == []
        assert found["asked"] == ["aten._local_scalar_dense.default"]


def outcome(step: int, applied: bool) -> StepOutcome:
    loss = 0.5 if applied else float("nan")
    return StepOutcome(step, {"image-to-text": loss, "text-to-text": 0.5}, 1.0, applied, stop=False)


def test_too_many_in_a_row_end_the_run() -> None:
    bad = BadSteps(limit=3)
    for step, applied in enumerate((False, False, True, False, False)):
        bad.add(outcome(step, applied))
    with pytest.raises(SharedError, match=r"step 5: the last 3 .*finite: image-to-text; optimizer.max_bad_steps=3"):
        bad.add(outcome(5, applied=False))


def test_a_step_left_out_does_not_hide_the_figures_of_the_others() -> None:
    interval = Meters(torch.device("cpu"), 1e12)
    for step, applied in enumerate((True, False)):
        interval.add(outcome(step, applied))
    summary = interval.summary()
    assert summary["loss"] == {"image-to-text": 0.5, "text-to-text": 0.5}
    assert summary["gradient_norm"] == 1.0


def test_a_batch_that_is_skipped_names_the_samples_of_the_rank_whose_loss_was_not_finite(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path / "data", shards=2, count=10)
    words = ["stage=stage1_single_flow", *TINY, "stage.init_from=null", "stage.global_batch_size=8", phases(8, (32, 4))]
    words += ["hardware.micro_batch_size={32:2,64:2}", f"data.manifest={manifest}", f"run_dir={tmp_path}/run"]
    poison = ["+data.stream.rank_of_poison=1", "+data.stream.batch=1", "+data.stream.row=3"]
    words += ["data.stream._target_=tests.training.trouble.PoisonStream", *poison, "checkpoint.every_steps=4"]
    (ending,) = run_cases(tmp_path / "cases", [Case(2, words)])
    assert ending.statuses == [0, 0], ending
    stream = PairStream(manifest, seed=0, resolution=32, global_batch_size=8)
    samples = stream.names(1)[6:]
    stream.close()
    (line,) = [line for line in ending.logs[1].splitlines() if line.startswith("warning: ")]
    assert line.startswith(
        "warning: step 2 is skipped: the loss of image-to-image is not finite on process 1, for a micro-batch, of "
        "these 2 samples: "
    )
    # Those of the second micro-batch.
    assert line.endswith(f": {', '.join(samples)}")
    assert "warning: step" not in ending.logs[0]
    assert read_metrics(tmp_path / "run")[-1]["skipped"] == 1


@pytest.mark.parametrize("unknown", [False, True])
def test_the_line_on_a_skipped_batch_has_a_bound(unknown: bool) -> None:
    bad = torch.tensor(torch.inf)
    tried = Tried(
        [] if unknown else [f"a/{number:09d}" for number in range(10_000)],
        torch.arange(10_000),
        [{"one": bad, "two": torch.tensor(1.0)}],
    )
    line = tried.poisoned()
    assert line.startswith("the loss of one is not finite on process 0, for a micro-batch, of these 10000 samples: ")
    assert len(line) < NAMED_CHARACTERS + 200
    assert line.endswith("...")
    assert Tried([], torch.arange(2), [{"one": torch.tensor(0.0)}] * 2).poisoned() == ""
