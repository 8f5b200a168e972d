"""W&B never decides whether training goes on: its own client, and a server that fails in all the ways that it can."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.cases import with_slow
from tests.pairs import write_pairs
from tests.programs import program
from tests.settings import phases
from tests.training.forks import Case, Ending, run_cases
from tests.training.wandb_server import WandbServer
from vdtrain.checkpoint.folder import checkpoint_name
from vdtrain.commands.preflight import main as preflight
from vdtrain.config.compose import compose
from vdtrain.config.schema import TrackingConfig
from vdtrain.evaluation.report import log_to_wandb
from vdtrain.tracking import wandb_run
from vdtrain.tracking import wandb_run as wandb_access
from vdtrain.tracking.metrics import METRICS_FILE, Tracker, read_metrics
from vdtrain.tracking.wandb_run import WANDB_ID_FILE, WANDB_URL_FILE

BATCH, STEPS, EVERY = 4, 18, 4
MINIATURE = [
    "stage=stage1_single_flow",
    "model=tiny",
    "data=shapes",
    "hardware=cpu",
    "stage.init_from=null",
    f"stage.global_batch_size={BATCH}",
    "hardware.micro_batch_size={32:2}",
    phases(BATCH, (32, STEPS)),
    "log_every_steps=1",
    f"checkpoint.every_steps={EVERY}",
    "watchdog_seconds=60",
    "data.stream._target_=tests.training.trouble.DrillStream",
]


def tracking(mode: str) -> TrackingConfig:
    return TrackingConfig(name=mode, mode=mode, project="test", entity=None)


def record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": {"text-to-image": 1.0 / step}, "gradient_norm": 0.5}


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.close()


@dataclass
class Story:
    """A run over five starts: what each left, and what the server had of the run before the next."""

    folder: Path
    endings: list[Ending] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def warnings(self, start: int) -> list[str]:
        return [line for line in self.endings[start].logs[0].splitlines() if line.startswith("warning: ")]


@pytest.fixture(scope="module")
def story(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Stopped; set back, and stopped; W&B run deleted, and stopped; no W&B, on two ranks, and stopped; to its end."""
    folder = tmp_path_factory.mktemp("story")
    write_pairs(folder / "data", count=40)
    run = folder / "run"
    own = [*MINIATURE, f"data.manifest={folder}/data/manifest", f"run_dir={run}", f"+data.stream.diary={folder}/diary"]

    def stopped(number: int) -> dict[str, str | int]:
        return {"rank": 0, "what": "SIGUSR1", "when": "batch", "number": number}

    cases = [
        Case(1, own, stopped(EVERY + 2)),
        Case(1, own, stopped(1)),
        Case(1, own, stopped(1)),
        Case(2, [*own, "watchdog_seconds=40"], stopped(1)),
        Case(1, own),
    ]
    told = Story(folder)

    def before(number: int) -> None:
        if number > 0:
            told.ids.append((run / WANDB_ID_FILE).read_text())
        if number == 1:
            last = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
            assert last.name > checkpoint_name(EVERY)
            shutil.rmtree(last)
        if number == 2:
            server.deleted.add(told.ids[-1])
        server.mood = "silent" if number == 3 else "well"

    environment = server.environment(folder)
    with patch.dict(os.environ, environment, clear=True):
        told.endings = run_cases(folder / "cases", cases, before)
    told.ids.append((run / WANDB_ID_FILE).read_text())
    return told


def test_no_start_ends_otherwise_for_what_befell_wandb(story: Story) -> None:
    statuses = [ending.statuses for ending in story.endings]
    assert statuses == [*[[os.EX_TEMPFAIL]] * 3, [os.EX_TEMPFAIL] * 2, [0]]
    assert [entry["step"] for entry in read_metrics(story.folder / "run")] == list(range(1, STEPS + 1))


def test_repeated_steps_are_neither_dropped_nor_moved(story: Story, server: WandbServer) -> None:
    """The second start goes on from before the last record of the first."""
    steps = server.runs[story.ids[1]].steps
    again = next(place for place in range(1, len(steps)) if steps[place] <= steps[place - 1])
    assert steps[:again] == list(range(1, steps[again - 1] + 1))
    assert steps[again] == EVERY + 1
    assert steps[again:] == list(range(EVERY + 1, steps[-1] + 1))
    assert [entry["_step"] for entry in server.runs[story.ids[1]].history.values()] == list(range(len(steps)))
    metrics = server.runs[story.ids[1]].config["_wandb"]["value"]["m"]
    assert {each.get("1", each.get("2")) for each in metrics} == {"samples", "*", *wandb_run.SUMMARIES}
    assert story.warnings(1) == []


def test_a_run_that_was_deleted_goes_on_as_a_new_one(story: Story, server: WandbServer) -> None:
    old, new = story.ids[1:3]
    assert old != new
    (line,) = story.warnings(2)
    assert f"run {old} was deleted there, and W&B takes no id twice; it goes on as {new}" in line
    # What the deleted one had is in it, too.
    assert server.runs[new].steps == list(range(1, STEPS + 1))


def test_an_outage_at_a_restart_is_a_line_and_is_made_up_for(story: Story, server: WandbServer) -> None:
    (line,) = story.warnings(3)
    assert "tracking.mode=online: W&B does not take this run (" in line
    assert f"its figures go to {story.folder}/run/{METRICS_FILE}, and the next start tries again" in line
    # The other rank waited for the one that tried, and both for no more than a quarter of the watchdog's limit.
    assert not (story.folder / "run" / "dumps").exists()
    assert story.ids[2:] == [story.ids[2]] * 3
    assert story.warnings(4) == []
    assert server.runs[story.ids[4]].ended
    url = (story.folder / "run" / WANDB_URL_FILE).read_text().strip()
    assert url == f"{server.address}/team/vdtrain/runs/{story.ids[4]}"


@pytest.fixture
def here(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder, in a process whose W&B is the server."""
    for name in [*os.environ]:
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    for name, value in server.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    run.mkdir()
    wandb_access.end_wandb()
    yield run
    server.mood = "well"
    wandb_access.end_wandb()


def started(run: Path, mode: str, first: int, *steps: int) -> list[str]:
    """The lines of a start that goes on from step `first` and does `steps`."""
    lines: list[str] = []
    tracker = Tracker(run, tracking(mode), {"seed": 0}, first, lines.append, wandb_seconds=3)
    for step in steps:
        tracker.log(record(step))
    tracker.close()
    return lines


def _mood(name: str) -> Callable[[Path, WandbServer, pytest.MonkeyPatch], None]:
    def prepare(run: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
        server.mood = name

    return prepare


def _no_key(run: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")


def _no_server(run: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def _no_package(run: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)


def _folder_for_id(run: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / WANDB_ID_FILE).unlink(missing_ok=True)
    (run / WANDB_ID_FILE).mkdir()


def _full_disk(run: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    (run / WANDB_ID_FILE).unlink(missing_ok=True)
    monkeypatch.setattr(wandb_run, "atomic_write", write)


def _broken_setting(run: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")


CAUSES = {
    "denied": (_mood("denied"), "returned error 401"),
    "broken": (_mood("broken"), "500"),
    "no key": (_no_key, "no API key for http://127.0.0.1:"),
    "no server": (_no_server, "connection refused"),
    "no package": (_no_package, "wandb is not installed; run `pip install 'vdtrain[tracking]'`"),
    "folder for the id": (_folder_for_id, "Is a directory"),
    "full disk": (_full_disk, "No space left on device"),
    "broken setting": (_broken_setting, "init_timeout"),
}


@pytest.mark.parametrize(("prepare", "reason"), with_slow(CAUSES, ("denied", "no server", "no package", "full disk")))
def test_a_start_without_wandb_is_one_line(
    here: Path,
    server: WandbServer,
    prepare: Callable[[Path, WandbServer, pytest.MonkeyPatch], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        prepare(here, server, patched)
        began = time.monotonic()
        (line,) = started(here, "online", 0, 1, 2)
    assert time.monotonic() - began < 25
    assert line.startswith("tracking.mode=online: W&B does not take this run (")
    assert reason in line
    assert len(line.splitlines()) == 1
    assert [entry["step"] for entry in read_metrics(here)] == [1, 2]


NO_IDS = {text: text for text in ("", "\n", "a/b#c", "ä" * 8, "\0" * 8, "two words")}


@pytest.mark.parametrize("content", with_slow(NO_IDS, ("", "a/b#c")))
def test_an_id_file_that_holds_no_id(here: Path, server: WandbServer, content: str) -> None:
    """The run goes on as another, which gets all figures."""
    assert started(here, "disabled", 0, 1, 2) == []
    (here / WANDB_ID_FILE).write_text(content)
    (line,) = started(here, "online", 2, 3)
    number = (here / WANDB_ID_FILE).read_text()
    assert re.fullmatch("[0-9a-f]{8}", number)
    assert (
        line
        == f"{here}/{WANDB_ID_FILE}: held no id of a W&B run; the run goes on there as {number}, with all its figures"
    )
    assert server.runs[number].steps == [1, 2, 3]
    # With the time at which they came about.
    times = [entry["time"] for entry in read_metrics(here)]
    assert [entry["_timestamp"] for entry in server.runs[number].history.values()] == pytest.approx(times, abs=0.01)


def test_the_end_of_a_run_does_not_wait_for_wandb(
    here: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_access, "FINISH_SECONDS", 2.0)
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 2.0)
    lines: list[str] = []
    tracker = Tracker(here, tracking("online"), {}, 0, lines.append)
    tracker.log(record(1))
    server.mood = "silent"
    for step in (2, 3):
        tracker.log(record(step))
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 15
    (line,) = lines
    pattern = (
        rf"W&B did not take the last figures within 2 s; they are in {here}/{METRICS_FILE}, and `wandb sync (\S+)`"
    )
    sync = re.match(pattern, line)
    assert sync is not None
    # What it names is there, and the next start sends the rest.
    assert list(Path(sync[1]).glob("*.wandb"))
    server.mood = "well"
    assert started(here, "online", 3, 4) == []
    assert server.runs[(here / WANDB_ID_FILE).read_text()].steps[-1] == 4


def test_nobody_is_asked_for_a_key(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal W&B would ask, and all processes wait for the answer."""
    monkeypatch.delenv("WANDB_API_KEY")
    code = (
        "import sys; from tests.training import test_wandb as w; print(w.started(w.Path(sys.argv[1]), 'online', 0, 1))"
    )
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [program("python"), "-c", code, here],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        timeout=120,
    )
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0
    assert "no API key for http://127.0.0.1:" in said
    assert "Enter your choice" not in said


@pytest.mark.slow
def test_offline_folders_are_sent_as_one_run(here: Path, server: WandbServer) -> None:
    """By the command that `vdtrain status` and preflight give, after two starts of which one repeats a step."""
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        assert started(here, "offline", first, *steps) == []
    program = Path(sys.executable).with_name("wandb")
    command = f"{program} sync {here}/wandb/offline-run-*"
    # It leaves logs where it is called.
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=120, cwd=here)
    assert server.runs[(here / WANDB_ID_FILE).read_text()].steps == [1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("variables", "arguments", "expected"),
    [
        ({}, [], ("online", "vdtrain", None)),
        ({"WANDB_MODE": "offline", "WANDB_PROJECT": "own", "WANDB_ENTITY": "team"}, [], ("offline", "own", "team")),
        ({"WANDB_MODE": "disabled"}, [], ("disabled", "vdtrain", None)),
        # What is said on the command line stands above the environment, as W&B has it.
        ({"WANDB_MODE": "offline"}, ["tracking.mode=online", "tracking.project=x"], ("online", "x", None)),
        ({"WANDB_MODE": "online"}, ["tracking=none"], ("disabled", "vdtrain", None)),
        ({"WANDB_MODE": "online"}, ["tracking=offline"], ("offline", "vdtrain", None)),
    ],
)
def test_wandbs_variables(
    here: Path,
    variables: dict[str, str],
    arguments: list[str],
    expected: tuple[str, str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = compose("train", arguments).tracking
    assert (found.mode, found.project, found.entity) == expected


def test_a_mode_that_is_none(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert preflight(["model=tiny", "data=shapes", "hardware=cpu"]) == 2
    assert "error: WANDB_MODE=dryrun: choose from online, offline, disabled\n" in capsys.readouterr().err


def test_the_mode_of_the_command_line_stands_above_the_environments(
    here: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert started(here, "online", 0, 1) == []
    assert server.runs[(here / WANDB_ID_FILE).read_text()].steps == [1]


def test_an_evaluation_outlives_wandb(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    result = {"checkpoint": {}, "settings": {}, "samples": 2, "pairs": {}, "flows": {"text-to-image": {"fid": 1.0}}}
    log_to_wandb(here, tracking("online"), result, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: tracking.mode=online: W&B does not take this evaluation (no API key for ")
    assert line.endswith(f"its figures are in {here}/metrics.json")
