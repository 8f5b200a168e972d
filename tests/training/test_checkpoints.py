"""Checkpoints: exact and elastic resume, publication as a whole, and what happens to damaged ones."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training.read_back import read_trainer_state, read_weights
from tests.training.toy import (
    SCALES,
    ZERO,
    RunOnRanks,
    Toy,
    difference,
    flip_byte,
    full_rows,
    full_weights,
    gather,
    same_bits,
    settings,
    toy_groups,
    train_step,
)
from vdtrain.checkpoint import store as checkpoints
from vdtrain.checkpoint.folder import INDEX_FILE, CheckpointError, candidates
from vdtrain.checkpoint.format import CARRIED_OVER_FILE, Checkpoint, Index, shard_name
from vdtrain.checkpoint.store import CheckpointStore, HostMemory, Snapshot, Verification, latest, load
from vdtrain.config.schema import SHARDED
from vdtrain.engine.engine import Engine, ShardEMA
from vdtrain.engine.flat import FIRST_MOMENT, SECOND_MOMENT
from vdtrain.run import distributed

Report = Callable[[dict[str, Any]], None]

TRAINED = ("global", "data.image", "data.text", "context.image")
TRAINED_FLOWS = [("image", "image"), ("text", "image")]
PRECISIONS = ("fp32", "bf16")
# Each takes up what the one before it wrote.
CROSSED = list(zip((ZERO[-1], *ZERO), ZERO, strict=False))
BEFORE, AFTER = 3, 2


def build(stage: int | str, precision: str = "fp32", seed: int = 0, trained: tuple[str, ...] = TRAINED) -> Run:
    module = Toy(seed)
    engine = Engine(module, toy_groups(module, trained), settings(zero_stage=stage, precision=precision))
    return Run(engine, ShardEMA(engine, 0.5))


class Run:
    """An engine and its average, trained together."""

    def __init__(self, engine: Engine, ema: ShardEMA) -> None:
        self.engine, self.ema = engine, ema

    def train(self, first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            losses.append(train_step(self.engine, step, TRAINED_FLOWS)[0])
            self.ema.update()
        return losses

    def model_weights(self) -> dict[str, Tensor]:
        return full_weights(self.engine)

    def ema_weights(self) -> dict[str, Tensor]:
        return gather(self.ema.buffers, [partition.layout for partition in self.engine.partitions()])


def write_alone(folder: Path, report: Report) -> None:
    report({"losses": train_save_train(folder, "alone", build(1))["losses"]})


def save(store: CheckpointStore, run: Run, state: dict[str, Any], step: int) -> Path:
    """Write a checkpoint while training stands still."""
    return store.write(Snapshot.take(run.engine, run.ema, state, step, HostMemory()))


def train_save_train(folder: Path, name: str, run: Run) -> dict[str, Any]:
    """Train, save, check what can be read back, and go on; the end is kept beside the store for comparison."""
    run.train(0, BEFORE)
    store = CheckpointStore(folder / name, keep=1)
    path = save(store, run, {"position": BEFORE}, BEFORE)
    found = {
        "model_bits": same_bits(trained_part(read_weights(path)), run.model_weights()),
        "ema_bits": same_bits(trained_part(read_weights(path, "ema")), run.ema_weights()),
        "carried_over": same_bits(passenger_part(read_weights(path)), passenger_part(dict(Toy().named_parameters()))),
        "differ": difference(run.model_weights(), run.ema_weights()),
        "losses": run.train(BEFORE, AFTER),
    }
    ending = {f"model/{key}": value for key, value in run.model_weights().items()}
    ending |= {f"ema/{key}": value for key, value in run.ema_weights().items()}
    if distributed.rank() == 0:
        save_file(ending, folder / f"{name}.safetensors")
        # No other process takes part.
        alone = latest(folder / name, Verification.ALONE)
        assert alone is not None
        assert alone.verified
        assert alone.path == path
    distributed.barrier()
    run.engine.close()
    return found


def take_up(folder: Path, name: str, stage: int | str, precision: str = "fp32") -> dict[str, Any]:
    """Load the checkpoint `name` into a run that started from other weights, and go on."""
    run = build(stage, precision, seed=7)
    checkpoint = latest(folder / name)
    assert checkpoint is not None
    load(checkpoint, run.engine, run.ema)
    path = checkpoint.path
    found = {
        "state": checkpoint.state,
        "model_bits": same_bits(trained_part(read_weights(path)), run.model_weights()),
        "ema_bits": same_bits(trained_part(read_weights(path, "ema")), run.ema_weights()),
        "carried_over": difference(
            passenger_part(dict(run.engine.module.named_parameters())), passenger_part(read_weights(path))
        ),
        "steps": max(run.engine.group_steps.values()),
        "losses": run.train(BEFORE, AFTER),
    }
    ending = {f"model/{key}": value for key, value in run.model_weights().items()}
    ending |= {f"ema/{key}": value for key, value in run.ema_weights().items()}
    expected = load_file(folder / f"{name}.safetensors")
    found |= {"end_bits": same_bits(ending, expected), "end_difference": difference(ending, expected)}
    run.engine.close()
    return found


def passenger_part(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name.startswith("context_layers.text")}


def trained_part(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name not in passenger_part(weights)}


def find_a_damage_of_one_rank(folder: Path) -> str:
    """Each process reads its share of the files; the second one reads the first one's partition."""
    copy = folder / "damaged"
    if distributed.rank() == 0:
        shutil.copytree(folder / "many", copy)
        flip_middle(copy / "step-000000004" / shard_name(0, 2))
    distributed.barrier()
    found = latest(copy, patience=1.0)
    return "" if found is None else found.path.name


def two_ranks(folder: Path, report: Report) -> None:
    found: dict[str, Any] = {}
    for stage in ZERO:
        found[f"alone-on-two-{stage}"] = take_up(folder, "alone", stage)
        for precision in PRECISIONS:
            name = f"two-{stage}-{precision}"
            found[f"written-{name}"] = train_save_train(folder, name, build(stage, precision))
            found[f"resumed-{name}"] = take_up(folder, name, stage, precision)
    for written, stage in CROSSED:
        found[f"crossed-{stage}"] = take_up(folder, f"two-{written}-fp32", stage)
    found["disk_full"] = save_on_a_full_disk(folder)
    found["state_of_tensors"] = save_a_state_that_is_no_json(folder)
    found["others"] = load_into_others(folder)
    found["thawed"] = {precision: freeze_and_thaw(folder, precision) for precision in PRECISIONS}
    found["left_out"] = {str(stage): left_out_or_at_rate_zero(stage) for stage in ZERO}
    found["pruned"] = save_many(folder)
    found["damaged"] = find_a_damage_of_one_rank(folder)
    found["killed"] = is_killed_while_saving(folder, lambda: report(found))
    report(found)


def failure(action: Callable[[], Any]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def save_on_a_full_disk(folder: Path) -> dict[str, Any]:
    run, store = build(1), CheckpointStore(folder / "full", keep=1)
    save(store, run, {}, 1)
    write = checkpoints.write_tensors

    def full(path: Path, tensors: dict[str, Tensor]) -> None:
        path.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    if distributed.rank() == 1:
        checkpoints.write_tensors = full
    message = failure(lambda: save(store, run, {}, 2))
    checkpoints.write_tensors = write
    names = sorted(path.name for path in store.folder.iterdir())
    newest = latest(store.folder)
    distributed.barrier()
    save(store, run, {}, 3)
    run.engine.close()
    return {
        "message": message,
        "names": names,
        "latest": newest and newest.path.name,
        "next": (store.folder / "latest").read_text(),
    }


def save_a_state_that_is_no_json(folder: Path) -> dict[str, Any]:
    run, store = build(1), CheckpointStore(folder / "no_json", keep=1)
    message = failure(lambda: save(store, run, {"generator": torch.zeros(3)}, 1))
    run.engine.close()
    return {"message": message, "latest": latest(store.folder)}


def load_into_others(folder: Path) -> dict[str, str]:
    checkpoint = latest(folder / "full")
    assert checkpoint is not None
    module = Toy()
    del module.context_layers["text"]
    engine = Engine(module, toy_groups(module, TRAINED), settings())
    model = failure(lambda: load(checkpoint, engine, None))
    engine.close()
    return {"model": model}


def freeze_and_thaw(folder: Path, precision: str) -> dict[str, Any]:
    """Two steps with all of TRAINED, two with data.image frozen, two with it and context.text trained at last."""
    store, frozen = CheckpointStore(folder / f"thaw-{precision}", keep=9), tuple(set(TRAINED) - {"data.image"})
    first = build(1, precision)
    first.train(0, 2)
    second = build(SHARDED, precision, seed=7, trained=frozen)
    checkpoint = Checkpoint.open(save(store, first, {}, 2))
    load(checkpoint, second.engine, second.ema)
    found = {"second": same_bits(everything(first.engine), everything(second.engine))}
    second.train(2, 2)
    names = set(second.engine._module.state_dict())
    held = {name for part in second.engine.partitions() for name in (slot.name for slot in part.layout.slots)}
    path = save(store, second, {}, 4)
    weights, average = read_weights(path), read_weights(path, "ema")
    kept = {name for name in weights if name.startswith("data_layers.image")}
    found |= {
        "frozen_bits": same_bits(
            {name: weights[name] for name in kept}, {name: first.model_weights()[name] for name in kept}
        ),
        "average_bits": same_bits({name: weights[name] for name in kept}, {name: average[name] for name in kept}),
        "complete": names == set(weights),
        "no_state": not held & kept,
    }
    third = build(2, precision, seed=8, trained=(*TRAINED, "context.text"))
    load(Checkpoint.open(path), third.engine, third.ema)
    moments = {**full_rows(third.engine, FIRST_MOMENT), **full_rows(third.engine, SECOND_MOMENT)}
    fresh = [name for name, moment in moments.items() if not moment.any()]
    found |= {"third": same_bits(everything(third.engine), weights), "fresh": sorted(fresh)}
    found |= {"steps": third.engine.group_steps, "ema": same_bits(third.ema_weights(), average)}
    third.train(4, 1)
    again = build(0, precision, seed=9, trained=(*TRAINED, "context.text"))
    load(Checkpoint.open(save(store, third, {}, 5)), again.engine, again.ema)
    found["again"] = again.engine.group_steps
    for run in (first, second, third, again):
        run.engine.close()
    return found


def left_out_or_at_rate_zero(stage: int | str) -> bool:
    """Whether freezing a group gives the other groups the bits of a run that moves the group by nothing."""
    ends = []
    for trained, scales in ((TRAINED, {**SCALES, "data.image": 0.0}), (TRAINED[:1] + TRAINED[2:], SCALES)):
        module = Toy()
        chosen = settings(zero_stage=stage, gradient_scales=scales, gradient_clip=0.0)
        engine = Engine(module, toy_groups(module, trained), chosen)
        for step in range(3):
            train_step(engine, step, TRAINED_FLOWS)
        ends.append({"moments": full_rows(engine, FIRST_MOMENT), "weights": everything(engine)})
        engine.close()
    at_zero, left_out = ends
    moments = {name: at_zero["moments"][name] for name in left_out["moments"]}
    return same_bits(at_zero["weights"], left_out["weights"]) and same_bits(moments, left_out["moments"])


def everything(engine: Engine) -> dict[str, Tensor]:
    """All weights, on every process: the trained ones in full and the others as rank 0 keeps them."""
    others: list[Any] = [engine.carried_over]
    dist.broadcast_object_list(others, src=0)
    return {**full_weights(engine), **others[0]}


def save_many(folder: Path) -> list[str]:
    run, store = build(2), CheckpointStore(folder / "many", keep=2)
    for step in (1, 2, 3, 4):
        save(store, run, {"position": step}, step)
    distributed.barrier()
    run.engine.close()
    return sorted(path.name for path in store.folder.iterdir())


def is_killed_while_saving(folder: Path, say: Callable[[], None]) -> dict[str, Any]:
    run, store = build(1), CheckpointStore(folder / "killed", keep=2)
    save(store, run, {"position": 1}, 1)

    def die(path: Path, tensors: dict[str, Tensor]) -> None:
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    if distributed.rank() == 1:
        say()
        checkpoints.write_tensors = die
    try:
        save(store, run, {"position": 2}, 2)
    except RuntimeError as error:
        return {"noticed": type(error).__name__, "names": sorted(path.name for path in store.folder.iterdir())}
    return {}


def take_over_alone(folder: Path, report: Report) -> None:
    found: dict[str, Any] = {}
    for written in ZERO:
        found[f"two-{written}-on-one"] = take_up(folder, f"two-{written}-fp32", 1)
    run, store = build(1), CheckpointStore(folder / "killed", keep=2)
    before = latest(store.folder)
    assert before is not None
    load(before, run.engine, run.ema)
    for position in (2, 3):
        save(store, run, {"position": position}, 2)
    found["after_kill"] = {
        "state": before.state,
        "names": sorted(path.name for path in store.folder.iterdir()),
        "saved": read_trainer_state(store.folder / "step-000000002"),
    }
    without, bare = build(1), CheckpointStore(folder / "bare", keep=1)
    without.train(0, 1)
    path = bare.write(Snapshot.take(without.engine, None, {}, 1, HostMemory()))
    found["no_average"] = failure(lambda: read_weights(path, "ema"))
    load(Checkpoint.open(path), run.engine, run.ema)
    found["average_restarts"] = same_bits(run.ema_weights(), without.model_weights())
    for each in (run, without):
        each.engine.close()
    report(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def alone(run_on_ranks: RunOnRanks, folder: Path) -> dict[str, Any]:
    return run_on_ranks(write_alone, 1, folder)[0]


@pytest.fixture(scope="module")
def two(run_on_ranks: RunOnRanks, folder: Path, alone: dict[str, Any]) -> list[dict[str, Any]]:
    return run_on_ranks(two_ranks, 2, folder, must_end_well=False)


@pytest.fixture(scope="module")
def afterwards(run_on_ranks: RunOnRanks, folder: Path, two: list[dict[str, Any]]) -> dict[str, Any]:
    return run_on_ranks(take_over_alone, 1, folder)[0]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", ZERO)
def test_resume_is_bitwise_exact(two: list[dict[str, Any]], stage: int | str, precision: str) -> None:
    for rank in two:
        written, resumed = rank[f"written-two-{stage}-{precision}"], rank[f"resumed-two-{stage}-{precision}"]
        assert resumed["losses"] == written["losses"]
        assert resumed["end_bits"]
        assert resumed["state"] == {"position": BEFORE}
        assert resumed["steps"] == BEFORE
        # The module itself holds what is not trained in its own precision.
        assert resumed["carried_over"] <= (0.0 if precision == "fp32" else 4e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", ZERO)
def test_weights_read_back_are_those_held(two: list[dict[str, Any]], stage: int | str, precision: str) -> None:
    for rank in two:
        written = rank[f"written-two-{stage}-{precision}"]
        assert written["model_bits"]
        assert written["ema_bits"]
        assert written["carried_over"]
        assert written["differ"] > 0


def check_elastic(found: dict[str, Any], expected: list[float]) -> None:
    assert found["model_bits"]
    assert found["ema_bits"]
    assert found["steps"] == BEFORE
    assert found["losses"] == pytest.approx(expected, rel=1e-6)
    assert found["end_difference"] < 1e-6


@pytest.mark.parametrize("stage", ZERO)
def test_one_rank_to_two(alone: dict[str, Any], two: list[dict[str, Any]], stage: int | str) -> None:
    for rank in two:
        check_elastic(rank[f"alone-on-two-{stage}"], alone["losses"])


@pytest.mark.parametrize("written", ZERO)
def test_two_ranks_to_one(two: list[dict[str, Any]], afterwards: dict[str, Any], written: int | str) -> None:
    check_elastic(afterwards[f"two-{written}-on-one"], two[0][f"written-two-{written}-fp32"]["losses"])


@pytest.mark.parametrize(("written", "stage"), CROSSED)
def test_every_strategy_takes_up_what_another_wrote(
    two: list[dict[str, Any]], written: int | str, stage: int | str
) -> None:
    for rank in two:
        check_elastic(rank[f"crossed-{stage}"], rank[f"written-two-{written}-fp32"]["losses"])


def test_a_full_disk_on_one_rank_fails_the_save_on_all(two: list[dict[str, Any]]) -> None:
    for rank in two:
        found = rank["disk_full"]
        assert "process 1" in found["message"]
        assert "No space left" in found["message"]
        assert found["latest"] == "step-000000001"
        assert found["next"] == "step-000000003\n"
    assert two[0]["disk_full"]["names"] == ["latest", "step-000000001"]


def test_a_state_that_is_no_json_is_refused(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert "JSON" in rank["state_of_tensors"]["message"]
        assert rank["state_of_tensors"]["latest"] is None


def test_another_model_is_refused(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert "stage.init_from" in rank["others"]["model"]
        assert "context_layers.text.weight is in only one of checkpoint and model" in rank["others"]["model"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_frozen_group_keeps_its_bits_and_one_that_is_trained_again_starts_with_no_state(
    two: list[dict[str, Any]], precision: str
) -> None:
    for rank in two:
        found = rank["thawed"][precision]
        ways = ("second", "frozen_bits", "average_bits", "complete", "no_state", "third", "ema")
        assert {way: found[way] for way in ways} == dict.fromkeys(ways, True)
        new = ("context_layers.text.weight", "data_layers.image.bias", "data_layers.image.weight")
        assert found["fresh"] == list(new)
        old = {"global": 4, "data.text": 4, "context.image": 4}
        assert found["steps"] == {**old, "data.image": 0, "context.text": 0}
        assert found["again"] == {group: count + 1 for group, count in found["steps"].items()}


def test_freezing_a_group_changes_no_bit_of_the_others(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["left_out"] == {str(stage): True for stage in ZERO}


def test_old_checkpoints_are_pruned(two: list[dict[str, Any]]) -> None:
    assert two[0]["pruned"] == ["latest", "step-000000003", "step-000000004"]


def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(
    two: list[dict[str, Any]], afterwards: dict[str, Any]
) -> None:
    assert two[0]["killed"]["noticed"]
    assert "step-000000002" not in two[0]["killed"]["names"]
    assert afterwards["after_kill"]["state"] == {"position": 1}


def test_a_checkpoint_of_the_same_step_is_replaced(afterwards: dict[str, Any]) -> None:
    assert afterwards["after_kill"]["names"] == ["latest", "step-000000001", "step-000000002"]
    assert afterwards["after_kill"]["saved"] == {"position": 3}


def test_without_average(afterwards: dict[str, Any]) -> None:
    assert "ema.enabled" in afterwards["no_average"]
    assert afterwards["average_restarts"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_middle(path: Path) -> None:
    flip_byte(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", [shard_name(1, 2), CARRIED_OVER_FILE, INDEX_FILE])
@pytest.mark.parametrize("harm", [truncate, flip_middle, Path.unlink])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(
    two: list[dict[str, Any]],
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    harm: Callable[[Path], None],
) -> None:
    copy = tmp_path / "many"
    shutil.copytree(folder / "many", copy)
    harmed = copy / "step-000000004"
    harm(harmed / name)
    with pytest.raises(CheckpointError, match="step-000000004"):
        read_weights(harmed)
    with pytest.raises(CheckpointError, match="step-000000004"):
        load(Checkpoint(harmed, Index.read(copy / "step-000000003")), None, None)  # the engine is not reached
    found = latest(copy)
    assert found is not None
    assert found.path == copy / "step-000000003"
    assert "step-000000004 is passed over" in caplog.text


def test_a_damage_that_one_rank_finds_is_one_for_all(two: list[dict[str, Any]]) -> None:
    assert [rank["damaged"] for rank in two] == ["step-000000003"] * 2


def test_a_stop_between_the_renames_of_a_replacement_loses_nothing(
    two: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "many"
    shutil.copytree(folder / "many", copy)
    (copy / "step-000000004").rename(copy / "step-000000004.replaced")
    (copy / "step-000000004.incomplete").mkdir()
    found = latest(copy)
    assert found is not None
    assert found.path == copy / "step-000000004.replaced"


def test_a_folder_that_does_not_exist_holds_nothing(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None


def test_keeping_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.keep"):
        CheckpointStore(tmp_path, keep=0)


def written(store: CheckpointStore, *steps: int) -> list[str]:
    """The names of a store's checkpoints after small ones of these steps."""
    for step in steps:
        index = Index(step, 1, 1, "fp32", 0, None, {}, groups=(), files={})
        store.write(Snapshot(index, {"global/master": torch.zeros(2)}, {}), lambda value: [value])
    return sorted(path.name for path in store.folder.glob("step-*"))


def test_what_comes_after_a_run_that_was_set_back_stays(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    names = [f"step-{step:09d}" for step in (2, 3, 5, 6)]
    assert written(CheckpointStore(folder, keep=2), 4, 5, 6) == names[2:]
    assert written(CheckpointStore(folder, keep=2), 1, 2, 3) == names
    found = latest(folder)
    assert found is not None
    assert found.path.name == names[1]


def test_a_damaged_checkpoint_that_was_written_again_counts(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, passed_over=["step-000000001", "step-000000002"])
    assert written(store, 2, 3) == ["step-000000002", "step-000000003"]


def test_a_file_that_arrived_short_is_not_published(tmp_path: Path) -> None:
    """A file system may show rank 0 less than another process wrote."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    written(store, 1)

    def gather(value: Any) -> list[Any]:
        records, failure = value
        if isinstance(records, dict):
            records = {name: {**record, "bytes": record["bytes"] + 8} for name, record in records.items()}
        return [[records, failure]]

    index = Index(2, 1, 1, "fp32", 0, None, {}, groups=(), files={})
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 2 was not saved: .* bytes here and"):
        store.write(Snapshot(index, {"global/master": torch.zeros(2)}, {}), gather)
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step-000000001"]


def test_a_replacement_comes_before_what_it_replaces(tmp_path: Path) -> None:
    for name in ("step-000000001", "step-000000002.replaced", "step-000000002", "step-000000010"):
        (tmp_path / name).mkdir()
    order = ["step-000000010", "step-000000002", "step-000000002.replaced", "step-000000001"]
    assert [path.name for path in candidates(tmp_path)] == order
    (tmp_path / "latest").write_text("step-000000001\n")
    assert [path.name for path in candidates(tmp_path)] == [order[-1], *order[:-1]]


def test_an_index_is_whole_whatever_the_order_of_its_numbers(tmp_path: Path) -> None:
    """Settings by resolution: as text, 256 sorts before 64."""
    settings = {"hardware": {"micro_batch_size": {64: 8, 256: 4, 1024: 1}}}
    trainer = {"config": settings, "state": {}}
    Index(1, 1, 1, "fp32", 1, 1, trainer, groups=(), files={}).write(tmp_path)
    assert Index.read(tmp_path).trainer["config"]["hardware"]["micro_batch_size"] == {"64": 8, "256": 4, "1024": 1}
