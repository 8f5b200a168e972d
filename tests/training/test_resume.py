"""A run that is stopped anywhere, in any way, on any number of ranks, goes on as if nothing had happened.

Whole runs of the three stages stand beside runs that are stopped and taken up again by the same command: on the same
ranks they agree to the last bit, on others to float32 rounding, and every sample is trained on once an epoch.

`make test` stops stage 1, and lets stage 3 change its ranks a little; `make test-slow` does the rest.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.pairs import write_pairs
from tests.settings import TINY, phases
from tests.training.forks import Case, Ending, run_cases
from vdtrain.checkpoint.format import Index, SliceReader
from vdtrain.tracking.metrics import read_metrics

STAGES = ("stage1_single_flow", "stage2_dual_flow", "stage3_four_flow")
# Two phases, of another resolution and another number of micro-batches; epochs of five steps.
LOW, HIGH, BATCH, SAMPLES = 7, 5, 4, 20
STEPS = LOW + HIGH
EVERY = 2
# Of a loss and of a flat buffer, on other numbers of ranks: ten times the most seen, with AVX2 and with AVX-512.
ROUNDING = 2e-6
MINIATURE = [
    *TINY,
    f"stage.global_batch_size={BATCH}",
    "hardware.micro_batch_size={32:2,64:1}",
    phases(BATCH, (32, LOW), (64, HIGH)),
    "optimizer.warmup_samples=20",
    "optimizer.learning_rate_scale=2",
    # About the size of the gradients: a smaller one lets AdamW magnify the rounding of gradients that are nearly zero,
    # which differs between processors and numbers of ranks.
    "optimizer.epsilon=1e-3",
    "log_every_steps=1",
    f"checkpoint.every_steps={EVERY}",
    "checkpoint.keep=2",
    "watchdog_seconds=120",
    "data.stream._target_=tests.training.trouble.DrillStream",
]
# Twelve ways to stop, four to a stage; the seed draws their order, their steps and the rank that each befalls.
WAYS = [
    ("SIGTERM", "batch"),
    ("SIGINT", "batch"),
    ("SIGUSR1", "batch"),
    ("SIGKILL", "batch"),
    ("SIGKILL", "batch"),
    ("SIGTERM", "open 0"),  # while warming up
    ("SIGUSR1", "open 1"),  # between phases
    ("SIGINT", "write"),  # while saving
    ("SIGKILL", "write"),  # in the middle of a file
    ("SIGKILL", "write"),
    ("SIGKILL", "publish"),  # between the renames
    ("SIGTERM", "end of phase"),
]
# The first of which every stop comes before the end of its run.
SEED = 572
Trouble = dict[str, str | int] | None
Changes = tuple[tuple[int, int, int], ...]
# A run on changing ranks: ranks, ZeRO stage, and the batch at which it is stopped; 0 goes on to the end.
ELASTIC = ((1, 1, 2), (2, 2, 1), (4, 1, 2), (2, 1, 1), (1, 2, 0))
BRIEF = ((1, 1, 2), (2, 2, 1), (1, 1, 0))
STOPPED = [STAGES[0], *(pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES[1:])]
# Stages, and how they change their ranks.
CHANGES = [
    pytest.param(STAGES[2], BRIEF, id="a few"),
    *(pytest.param(stage, ELASTIC, id=stage, marks=pytest.mark.slow) for stage in STAGES),
]


@dataclass
class Drill:
    """Runs in a folder, each trained when a test first asks for it.

    Attributes:
        endings: of the starts of a run, by its name.
    """

    folder: Path
    endings: dict[str, list[Ending]] = field(default_factory=dict)

    def whole(self, stage: str) -> str:
        """A run of a stage that nothing disturbs, from the one before; its name."""
        return self._run(f"whole-{stage}", [(2, self._settings(stage), None)])

    def broken(self, stage: str) -> str:
        """The same that is stopped in several ways; its name."""
        stops: list[Trouble] = [befalls for _, befalls in stops_by_stage(SEED)[STAGES.index(stage)]]
        return self._run(f"broken-{stage}", [(2, self._settings(stage), trouble) for trouble in (*stops, None)])

    def alone(self, stage: str) -> str:
        """A run on one rank; its name."""
        return self._run(f"alone-{stage}", [(1, self._settings_of_changes(stage), None)])

    def elastic(self, stage: str, changes: Changes) -> str:
        """The same on changing ranks; its name."""
        starts = []
        for ranks, zero_stage, steps in changes:
            stop: Trouble = {"rank": 0, "what": "SIGTERM", "when": "batch", "number": steps} if steps else None
            exchange = "deepspeed" if ranks == 2 else "sharded"
            zero = [f"hardware.zero_stage={zero_stage}", f"hardware.exchange={exchange}"]
            starts.append((ranks, [*self._settings_of_changes(stage), *zero], stop))
        return self._run(f"elastic-{len(changes)}-{stage}", starts)

    def _settings(self, stage: str) -> list[str]:
        number = STAGES.index(stage)
        start = f"{self.folder}/{self.whole(STAGES[number - 1])}" if number else "null"
        return [f"stage={stage}", f"stage.init_from={start}"]

    def _settings_of_changes(self, stage: str) -> list[str]:
        same = ["stage.init_from=null", "optimizer.learning_rate_scale=1", "hardware.micro_batch_size={32:1,64:1}"]
        return [f"stage={stage}", *same]

    def _run(self, name: str, starts: list[tuple[int, list[str], Trouble]]) -> str:
        if name not in self.endings:
            own = [f"data.manifest={self.folder}/data/manifest", f"run_dir={self.folder}/{name}"]
            cases = [
                Case(ranks, [*MINIATURE, *own, f"+data.stream.diary={self.folder}/{name}-{number}", *words], trouble)
                for number, (ranks, words, trouble) in enumerate(starts)
            ]
            self.endings[name] = run_cases(self.folder / f"{name}-cases", cases)
        return name

    def final(self, run: str) -> Path:
        checkpoints = self.folder / run / "checkpoints"
        return checkpoints / (checkpoints / "latest").read_text().strip()


def stops_by_stage(seed: int) -> list[list[tuple[tuple[str, str], dict[str, str | int]]]]:
    """For every stage four ways to stop, each with the trouble that brings it about.

    How far a killed run had come depends on which of its saves was published, so that only bounds are known.
    """
    generator = random.Random(seed)
    ways = list(WAYS)
    generator.shuffle(ways)
    stages = []
    for number in range(3):
        # What needs the end of the first phase comes last: after it there is none.
        own = sorted(ways[number::3], key=lambda way: way[1] in ("open 1", "end of phase"))
        stops, furthest = [], 0
        for what, when in own:
            passing = generator.randrange(3 if when == "batch" else 2)
            befalls: dict[str, str | int] = {"what": what, "rank": generator.randrange(2)}
            if when in ("open 1", "end of phase"):
                assert furthest < LOW
            if when.startswith("open"):
                befalls |= {"when": "open", "number": int(when[-1])}
            elif when == "end of phase":
                befalls |= {"when": "place", "number": LOW - 1}
            elif when == "publish":
                befalls |= {"when": when, "number": passing, "rank": 0}
            else:
                befalls |= {"when": when, "number": passing}
            if when == "batch":
                furthest += passing
            elif when in ("write", "publish"):
                furthest += EVERY * (passing + 1)
            # A signal is agreed on at the latest after two steps, and a file may be written while others run.
            furthest = LOW if when in ("open 1", "end of phase") else furthest
            furthest += 0 if what == "SIGKILL" or when == "open 0" else 2 + (EVERY if when == "write" else 0)
            assert furthest < STEPS
            stops.append(((what, when), befalls))
        stages.append(stops)
    return stages


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    folder = tmp_path_factory.mktemp("resume")
    write_pairs(folder / "data", count=SAMPLES // 2)
    return Drill(folder)


def rows(checkpoint: Path) -> dict[str, Tensor]:
    """Everything that a checkpoint holds of each layer group, whole."""
    index = Index.read(checkpoint)
    kinds = ["master", "exp_avg", "exp_avg_sq", "ema"]
    with SliceReader(checkpoint, index) as reader:
        return {
            f"{layout.group}/{kind}": reader.read(layout.group, kind, 0, layout.numel)
            for layout in index.groups
            for kind in kinds
        }


def figures(drill: Drill, run: str) -> list[tuple[int, int, dict[str, float], float]]:
    records = read_metrics(drill.folder / run)
    return [(each["step"], each["resolution"], each["loss"], each["gradient_norm"]) for each in records]


def diary(drill: Drill, run: str, start: int, ranks: int) -> list[list[dict[str, Any]]]:
    """Batches that one start of a run delivered, by step and rank."""
    by_rank = []
    for rank in range(ranks):
        path = drill.folder / f"{run}-{start}-{rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        by_rank.append([json.loads(line) for line in lines])
    return [list(batch) for batch in zip(*by_rank, strict=False)]


@pytest.mark.parametrize("stage", STOPPED)
def test_every_way_to_stop_befell_a_run(drill: Drill, stage: str) -> None:
    *stopped, last = drill.endings[drill.broken(stage)]
    for (way, _), ending in zip(stops_by_stage(SEED)[STAGES.index(stage)], stopped, strict=True):
        assert f"drill: {way[0]}" in "".join(ending.logs), (stage, way, ending)
        expected = {"SIGKILL": [-9, 1], "SIGINT": [130, 130]}.get(way[0], [75, 75])
        assert sorted(ending.statuses) == sorted(expected), (stage, way, ending)
        assert "Traceback" not in "".join(ending.logs)
    assert last.statuses == [0, 0], last
    assert drill.endings[drill.whole(stage)][0].statuses == [0, 0]


@pytest.mark.parametrize("stage", STOPPED)
def test_a_stopped_run_ends_as_the_whole_one_to_the_last_bit(drill: Drill, stage: str) -> None:
    whole, broken = drill.final(drill.whole(stage)), drill.final(drill.broken(stage))
    assert whole.name == broken.name == f"step-{STEPS:09d}"
    assert figures(drill, drill.broken(stage)) == figures(drill, drill.whole(stage))
    assert [step for step, *_ in figures(drill, drill.whole(stage))] == list(range(1, STEPS + 1))
    for rank in range(2):
        name = f"rank-{rank:05d}-of-00002.safetensors"
        expected, found = load_file(whole / name), load_file(broken / name)
        assert expected.keys() == found.keys()
        assert {key.rpartition("/")[2] for key in found} == {"master", "exp_avg", "exp_avg_sq", "ema"}
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    one, other = Index.read(whole), Index.read(broken)
    assert (one.optimizer_steps, one.ema_updates, one.trainer["state"]) == (
        other.optimizer_steps,
        other.ema_updates,
        other.trainer["state"],
    )


@pytest.mark.slow
def test_stages_follow_one_another(drill: Drill) -> None:
    """The comparison above would hold for stages that all start from nothing, or that change nothing."""
    before, after = (rows(drill.final(drill.whole(stage))) for stage in STAGES[:2])
    assert not torch.equal(before["global/master"], after["global/master"])
    assert after.keys() > before.keys()
    log = drill.endings[drill.whole(STAGES[1])][0].logs[0]
    assert re.search(rf"starts from .*whole-{STAGES[0]}/checkpoints/step-{STEPS:09d}", log)


@pytest.mark.parametrize(("stage", "changes"), CHANGES)
def test_ranks_and_zero_stages_may_change_on_the_way(drill: Drill, stage: str, changes: Changes) -> None:
    runs = drill.alone(stage), drill.elastic(stage, changes)
    *stopped, last = drill.endings[runs[1]]
    assert [ending.statuses for ending in stopped] == [[75] * ranks for ranks, _, _ in changes[:-1]]
    assert last.statuses == [0]
    alone, elastic = (figures(drill, run) for run in runs)
    assert [each[0] for each in elastic] == list(range(1, STEPS + 1))
    for expected, found in zip(alone, elastic, strict=True):
        assert found[1] == expected[1]
        assert found[2] == pytest.approx(expected[2], rel=ROUNDING)
    one, other = (rows(drill.final(run)) for run in runs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        error = (other[name] - tensor).norm() / tensor.norm()
        assert error < ROUNDING, (name, error)


@pytest.mark.parametrize(("stage", "changes"), CHANGES)
def test_every_sample_is_trained_on_once_an_epoch_across_a_change_of_ranks(
    drill: Drill, stage: str, changes: Changes
) -> None:
    run = drill.elastic(stage, changes)
    logs = [ending.logs[0] for ending in drill.endings[run]]
    begun = [int(step) for log in logs for step in re.findall(r"continues from .*/step-(\d+)", log)]
    trained: dict[int, list[dict[str, Any]]] = {}
    for start, ((ranks, _, _), first, end) in enumerate(zip(changes, (0, *begun), (*begun, STEPS), strict=True)):
        for batch in diary(drill, run, start, ranks):
            positions = [position for part in batch for position in part["positions"]]
            phase, place = batch[0]["seed"], positions[0] // BATCH
            # The batch after the last one is made ready too, and not trained on.
            if place < (LOW, HIGH)[phase] and place + LOW * phase < end:
                assert place + LOW * phase >= first
                seen = [row for part in batch for row in part["rows"]]
                trained.setdefault(phase, []).append({"positions": positions, "rows": seen})
    assert [len(batches) for batches in trained.values()] == [LOW, HIGH]
    for batches in trained.values():
        assert [position for batch in batches for position in batch["positions"]] == list(range(len(batches) * BATCH))
        seen = [row for batch in batches for row in batch["rows"]]
        for epoch in range(0, len(seen), SAMPLES):
            counts = Counter(seen[epoch : epoch + SAMPLES])
            assert set(counts.values()) == {1}
    assert len({row for batch in trained[0] for row in batch["rows"]}) == SAMPLES
