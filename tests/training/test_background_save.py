"""Saves beside training: what they hold, that training does not wait for them, and that it outlives their failure."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.read_back import read_weights
from tests.training.test_checkpoints import Run, build, trained_part
from tests.training.toy import RunOnRanks, same_bits
from vdtrain.checkpoint import store as checkpoints
from vdtrain.checkpoint.saver import BackgroundSaver
from vdtrain.checkpoint.store import CheckpointStore, latest
from vdtrain.run import distributed


def on_two_ranks(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    run = build(1)
    found = {
        "content": go_on_while_writing(folder / "content", run),
        "slow": meet_a_slow_disk(folder / "slow", run),
        "small": meet_a_small_disk(folder / "small", run),
        "kept": save_many(folder / "kept", run),
    }
    run.engine.close()
    report(found)


class SlowDisk:
    """Writing a tensor file waits for `release` on one rank."""

    def __init__(self, rank: int) -> None:
        self.release = threading.Event()
        self.write = checkpoints.write_tensors
        if distributed.rank() == rank:
            checkpoints.write_tensors = self._write

    def _write(self, path: Path, tensors: Any) -> Any:
        assert self.release.wait(60)
        return self.write(path, tensors)

    def restore(self) -> None:
        self.release.set()
        checkpoints.write_tensors = self.write


def go_on_while_writing(folder: Path, run: Run) -> dict[str, Any]:
    saver = BackgroundSaver(CheckpointStore(folder, keep=2))
    run.train(0, 2)
    found: dict[str, Any] = {}
    # Twice, for the second save is written out of memory that the first one used.
    for step in (2, 4):
        disk = SlowDisk(rank=1)
        then, average = run.model_weights(), run.ema_weights()
        saver.begin(run.engine, run.ema, {"step": step}, step)
        run.train(step, 2)
        found[f"published early {step}"] = (folder / f"step-{step:09d}").exists()
        # Both have looked before the slow disk is released.
        distributed.barrier()
        disk.restore()
        saver.wait()
        distributed.barrier()
        path = folder / f"step-{step:09d}"
        found[f"model {step}"] = same_bits(trained_part(read_weights(path)), then)
        found[f"average {step}"] = same_bits(trained_part(read_weights(path, "ema")), average)
        found[f"moved {step}"] = not same_bits(run.model_weights(), then)
    found["saved"] = saver.saved_step
    saver.close()
    return found


def meet_a_slow_disk(folder: Path, run: Run) -> dict[str, Any]:
    saver = BackgroundSaver(CheckpointStore(folder, keep=3), timeout_seconds=0.2)
    disk = SlowDisk(rank=1)
    for step in (1, 2, 3):
        saver.begin(run.engine, run.ema, {}, step)
    given_up = saver.failures()
    disk.restore()
    saver.wait()
    saver.begin(run.engine, run.ema, {}, 4)
    saver.wait()
    distributed.barrier()
    found = {"given_up": given_up, "failed": saver.failed, "names": sorted(path.name for path in folder.iterdir())}
    saver.close()
    return found


def meet_a_small_disk(folder: Path, run: Run) -> dict[str, Any]:
    """One rank may write files of 100 bytes only, as if its disk were full."""
    saver = BackgroundSaver(CheckpointStore(folder, keep=3))
    saver.begin(run.engine, run.ema, {}, 1)
    saver.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    saver.begin(run.engine, run.ema, {}, 2)
    saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    failures, saved = saver.failures(), saver.saved_step
    distributed.barrier()
    names = sorted(path.name for path in folder.iterdir())
    saver.begin(run.engine, run.ema, {}, 3)
    saver.wait()
    distributed.barrier()
    newest = latest(saver.store.folder)
    found = {"failures": failures, "saved": saved, "names": names, "next": newest and newest.path.name}
    saver.close()
    return found


def save_many(folder: Path, run: Run) -> list[str]:
    saver = BackgroundSaver(CheckpointStore(folder, keep=2, keep_every_steps=3))
    for step in range(1, 9):
        saver.begin(run.engine, run.ema, {}, step)
    saver.wait()
    distributed.barrier()
    saver.close()
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def two(run_on_ranks: RunOnRanks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("background"))


@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_holds_its_own_step_though_training_went_on(two: list[dict[str, Any]], step: int) -> None:
    for rank in two:
        found = rank["content"]
        assert found[f"moved {step}"]
        assert found[f"model {step}"]
        assert found[f"average {step}"]
        assert not found[f"published early {step}"]
        assert found["saved"] == 4


def test_a_save_that_does_not_end_keeps_the_next_from_beginning_on_every_rank(two: list[dict[str, Any]]) -> None:
    for rank in two:
        found = rank["slow"]
        assert len(found["given_up"]) == found["failed"] == 2
        for step, line in zip((2, 3), found["given_up"], strict=True):
            assert f"step {step} was not saved" in line
            assert "still writes the one of step 1" in line
        assert found["names"] == ["latest", "step-000000001", "step-000000004"]


def test_a_disk_that_fails_on_one_rank_fails_the_save_on_all_and_the_next_one_tries_again(
    two: list[dict[str, Any]],
) -> None:
    for rank in two:
        found = rank["small"]
        (line,) = found["failures"]
        assert "step 2 was not saved: process 1: cannot be written (File too large)" in line
        assert "\n" not in line
        assert found["saved"] == 1
        assert found["names"] == ["latest", "step-000000001"]
        assert found["next"] == "step-000000003"


def test_the_newest_stay_and_one_in_so_many_steps(two: list[dict[str, Any]]) -> None:
    steps = [int(name.removeprefix("step-")) for name in two[0]["kept"] if name != "latest"]
    assert steps == [3, 6, 7, 8]
