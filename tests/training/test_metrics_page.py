"""What docs/metrics.md names is what both trackers have, as their own readers tell, across a kill and two stages."""

from __future__ import annotations

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.pairs import write_pairs
from tests.settings import phases
from tests.training.forks import Case, Ending, run_cases
from tests.training.wandb_server import Run, WandbServer
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrackingConfig, TrainConfig
from vdtrain.data.batch import Batch
from vdtrain.data.stream import PairStream
from vdtrain.tracking.metrics import Tracker, flat, read_lines, read_metrics
from vdtrain.tracking.tensorboard import FOLDER, PLACE
from vdtrain.tracking.wandb_run import WANDB_ID_FILE
from vdtrain.training import checks

ROOT = Path(__file__).parents[2]
STAGES = ("stage1_single_flow", "stage2_dual_flow")
BATCH, LOW, HIGH, KILLED_AT = 8, 8, 4, 7
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "curriculum", "SLURM_CLUSTER_NAME": "tiny"}
SETTINGS = [
    "model=tiny",
    "data=shapes",
    "hardware=cpu",
    "tracking=offline",
    "tracking.tensorboard=true",
    "tracking.tags=[tiny, first]",
    "tracking.notes=a trial of all meters",
    f"stage.global_batch_size={BATCH}",
    "hardware.micro_batch_size={32:4,64:4}",
    phases(BATCH, (32, LOW), (64, HIGH)),
    "optimizer.warmup_samples=0",
    "log_every_steps=2",
    *("samples.every=32", "samples.count=2", "samples.steps=1", "samples.time_share=null"),
    *("validation.every=32", "validation.pairs=4", "validation.time_share=null", "data.validation.share=0.2"),
    "checkpoint.every_steps=4",
]


class KilledStream(PairStream):
    """Kills its process and that of W&B before it delivers batch `KILLED_AT`, as the end of a job does."""

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(super().__iter__()):
            if number == KILLED_AT:
                end_with_children()
            yield batch


def end_with_children() -> None:
    states = [path.read_text().rpartition(")") for path in Path("/proc").glob("[0-9]*/stat")]
    for number, _, rest in states:
        if int(rest.split()[1]) == os.getpid():
            os.kill(int(number.split()[0]), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Curriculum:
    """Two stages; the first was killed and run again. `sent` is what W&B's server has of each."""

    folder: Path
    endings: list[Ending]
    sent: list[Run]

    def run(self, stage: int) -> Path:
        return self.folder / "runs" / STAGES[stage]


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.close()


def sync(run_dir: Path, server: WandbServer, folder: Path) -> Run:
    """Send a run's offline folders by the documented command; what the server then has."""
    program = Path(sys.executable).with_name("wandb")
    command = f"{program} sync {shlex.quote(str(run_dir))}/wandb/offline-run-*"
    environment = server.environment(folder)
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=120, cwd=folder, env=environment)
    return server.runs[(run_dir / WANDB_ID_FILE).read_text()]


@pytest.fixture(scope="module")
def curriculum(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Curriculum:
    folder = tmp_path_factory.mktemp("page")
    manifest = write_pairs(folder / "data")
    first, second = (
        [f"stage={stage}", *SETTINGS, f"data.manifest={manifest}", f"runs_dir={folder}/runs"] for stage in STAGES
    )
    killed = [*first, f"data.stream._target_={__name__}.KilledStream"]
    cases = [Case(1, killed), Case(1, first), Case(1, second)]
    with patch.dict(os.environ, {**server.environment(folder), **JOB, "PYTHONPATH": str(ROOT)}, clear=True):
        endings = run_cases(folder / "cases", cases)
    sent = [sync(folder / "runs" / stage, server, folder) for stage in STAGES]
    return Curriculum(folder, endings, sent)


def documented() -> list[str]:
    """The names of the page's table of figures."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    table = text.partition("## Figures")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)


# Of docs/watching.md, without scores.
VALIDATION = [
    *("validation/FLOW/model", "validation/FLOW/ema", "validation_seconds"),
    *(f"validation_quarter/FLOW/{weights}/q{quarter}" for weights in ("model", "ema") for quarter in range(1, 5)),
]


def expected_names(record: dict[str, Any]) -> set[str]:
    """What the pages promise for the flows and the layer groups of a record, images left out."""
    names = set()
    for name in [*documented(), *VALIDATION]:
        for flow in record["loss"]:
            for group in record["learning_rates"]:
                names.add(name.replace("FLOW", flow).replace("GROUP", group))
    return names


def events(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / FOLDER), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def test_a_killed_stage_and_the_next_come_to_their_ends(curriculum: Curriculum) -> None:
    assert [ending.statuses for ending in curriculum.endings] == [[-signal.SIGKILL], [0], [0]]
    for stage in range(2):
        steps = [record["step"] for record in read_metrics(curriculum.run(stage))]
        assert steps == list(range(2, LOW + HIGH + 1, 2))


@pytest.mark.parametrize("stage", [0, 1])
def test_every_name_of_the_page_is_in_both_trackers_and_no_other(curriculum: Curriculum, stage: int) -> None:
    record = read_metrics(curriculum.run(stage))[-1]
    expected = expected_names(record)
    wandb = {name for line in curriculum.sent[stage].history.values() for name in line if not name.startswith("_")}
    images = {f"samples/{flow}" for flow in record["loss"]}
    assert wandb == expected | images
    assert set(events(curriculum.run(stage)).Tags()["images"]) == images
    # There, the axis is no figure.
    assert set(events(curriculum.run(stage)).Tags()["scalars"]) == expected - {"samples"}


@pytest.mark.parametrize("stage", [0, 1])
def test_tensorboard_has_every_record_once(curriculum: Curriculum, stage: int) -> None:
    found = events(curriculum.run(stage))
    records = read_lines(curriculum.run(stage))
    for name in found.Tags()["scalars"]:
        lines = [line for line in records if "loss" in line or name not in PLACE]
        figures = [(line["samples"], flat(line)[name]) for line in lines if name in flat(line)]
        scalars = found.Scalars(name)
        assert [scalar.step for scalar in scalars] == [samples for samples, _ in figures]
        assert [scalar.value for scalar in scalars] == pytest.approx([value for _, value in figures], rel=1e-6)
    for name in found.Tags()["images"]:
        drawn = [line for line in records if line.get("image") == name]
        assert [image.step for image in found.Images(name)] == [line["samples"] for line in drawn]
        assert len(drawn) >= 4
        for image, line in zip(found.Images(name), drawn, strict=True):
            assert image.encoded_image_string == (curriculum.run(stage) / line["path"]).read_bytes()
    # With the time at which they came about.
    times = [record["time"] for record in read_metrics(curriculum.run(stage))]
    assert [scalar.wall_time for scalar in found.Scalars("step")] == pytest.approx(times, abs=0.01)
    assert b"global_batch_size: 8" in found.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize("stage", [0, 1])
def test_wandb_has_every_record(curriculum: Curriculum, stage: int) -> None:
    """Also those that W&B's process had only in memory when it was killed."""
    lines = [line for _, line in sorted(curriculum.sent[stage].history.items())]
    records = read_lines(curriculum.run(stage))
    # Of the folder that the kill left, nothing is sent, so that no line is there twice.
    assert [line["samples"] for line in lines] == [record["samples"] for record in records]
    for line, record in zip(lines, records, strict=True):
        sent = {name: value for name, value in line.items() if not name.startswith("_")}
        if "image" in record:
            path = Path(sent.pop(record["image"])["path"])
            assert path.as_posix() in curriculum.sent[stage].files
        assert sent == pytest.approx(flat(record))


def test_wandb_has_configuration_versions_job_and_names(curriculum: Curriculum) -> None:
    for stage, run in enumerate(curriculum.sent):
        config = {name: each["value"] for name, each in run.config.items()}
        assert config["stage"]["name"] == STAGES[stage]
        assert config["environment"]["slurm"] == {"cluster_name": "tiny", "job_id": "4711", "job_name": "curriculum"}
        assert config["environment"]["versions"].keys() >= {"python", "torch", "deepspeed", "vdtrain"}
        assert re.fullmatch(r"[0-9a-f]{12}\+?", config["environment"]["commit"])
        assert config["environment"]["processes"] == 1
        assert (run.names["displayName"], run.names["jobType"]) == (STAGES[stage], "train")
        assert (run.names["tags"], run.names["notes"]) == (["tiny", "first"], "a trial of all meters")
    first, second = (run.names["groupName"] for run in curriculum.sent)
    assert first == second
    assert first.startswith("runs-")


def test_images_and_alerts_are_in_both(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a restart that repeats a step, draws an image of the step before it again, and lost one image's file."""
    run = tmp_path / "run"
    for number in range(3):
        path = run / "samples" / str(number) / "text-to-image.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (20 + number, 10), (90 * number, 0, 0)).save(path)
    for name, value in server.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    lines: list[str] = []
    settings = TrackingConfig("mine", "offline", "test", None, group="ours", job_type="trial", tensorboard=True)
    for start in (0, 1):
        tracker = Tracker(run, settings, {"seed": 0}, start, lines.append, batch=4)
        for step in range(start, 3):
            if step > 0:
                tracker.log({"step": step, "samples": 4 * step, "loss": {"a": 1.0}, "skipped": step // 2})
            tracker.log_image("samples/text-to-image", run / "samples" / str(step) / "text-to-image.png", 4 * step)
        tracker.alert("training stands still", "no step for 300 s")
        tracker.close()
    assert lines == []
    images = [line["path"] for line in read_lines(run) if "image" in line]
    assert images == [f"samples/{step}/text-to-image.png" for step in range(3)]
    found = events(run)
    shown = found.Images("samples/text-to-image")
    assert [(image.step, image.width, image.height) for image in shown] == [(0, 20, 10), (4, 21, 10), (8, 22, 10)]
    assert shown[2].encoded_image_string == (run / "samples" / "2" / "text-to-image.png").read_bytes()
    assert [scalar.step for scalar in found.Scalars("loss/a")] == [4, 8]
    texts = {"alert/steps were skipped/text_summary", "alert/training stands still/text_summary"}
    assert texts <= set(found.Tags()["tensors"])
    sent = sync(run, server, tmp_path)
    shown = {line["samples"] for line in sent.history.values() if "samples/text-to-image" in line}
    assert shown == {0, 4, 8}
    assert len([name for name in sent.files if name.startswith("media/images/samples/text-to-image")]) >= 3
    assert {title for title, _ in sent.alerts} == {"steps were skipped", "training stands still"}
    assert (sent.names["displayName"], sent.names["groupName"], sent.names["jobType"]) == ("mine", "ours", "trial")


BOARD = TrackingConfig(None, "disabled", "test", None, tensorboard=True)


def logged(run: Path, start: int, *steps: int) -> list[str]:
    """The lines of a start that goes on from step `start` and logs `steps`, with TensorBoard alone."""
    lines: list[str] = []
    tracker = Tracker(run, BOARD, {"notes": "x" * 20_000}, start, lines.append, batch=4)
    for step in steps:
        tracker.log({"step": step, "loss": {"a": float(step)}})
    tracker.close()
    return lines


def test_tensorboard_outlives_a_full_disk_damage_and_a_gap_in_its_use(tmp_path: Path) -> None:
    # As by `tracking=none`: the next start makes up for it.
    Tracker(tmp_path, TrackingConfig(None, "disabled", "test", None), {}, 0).log({"step": 1, "loss": {"a": 1.0}})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (21_000, limit[1]))
    try:
        (line,) = logged(tmp_path, 1, *range(2, 40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert line.startswith(f"{tmp_path}/{FOLDER}: takes no more of this run (")
    assert line.endswith(f"); its figures are in {tmp_path}/metrics.jsonl")
    assert 1 < len(events(tmp_path).Scalars("loss/a")) < 39
    assert logged(tmp_path, 38, 39, 40) == []
    with max((tmp_path / FOLDER).iterdir()).open("ab") as file:
        file.write(b"\xff" * 30)
    assert logged(tmp_path, 40, 41) == []
    max((tmp_path / FOLDER).iterdir()).write_bytes(b"damage")
    assert logged(tmp_path, 41, 42) == []
    found = events(tmp_path).Scalars("loss/a")
    assert [(each.step, each.value) for each in found] == [(4 * step, float(step)) for step in range(1, 43)]


def test_without_its_package_tensorboard_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = to_object(compose("train", ["tracking=tensorboard", f"run_dir={tmp_path}"]), TrainConfig)
    kept = f"{tmp_path}/metrics.jsonl"
    assert checks.tracking(config).line == (f"tracking.mode=disabled: figures go to TensorBoard's files and to {kept}")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    remedy = "tensorboardX is not installed; run `pip install 'vdtrain[tracking]'`"
    assert checks.tracking(config).line == (f"tracking.tensorboard=true: {remedy}, or set tracking.tensorboard=false")
    (line,) = logged(tmp_path, 0, 1)
    assert line == f"{tmp_path}/{FOLDER}: takes no more of this run ({remedy}); its figures are in {kept}"
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
