"""The repository's batch scripts, submitted to a real cluster of two nodes.

The curriculum runs in a chain of jobs. With `make test-slow`, stage 3 runs undisturbed, and again: it is then preempted
by a job of higher priority, loses a node amid a step, and ends with the same losses.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.documents.commands import of_page
from tests.evaluation.test_evaluate import write_checkpoint
from tests.pairs import write_pairs
from tests.programs import program as program_of_tests
from tests.settings import TINY, phases
from tests.slurm.cluster import Cluster
from vdtrain.flows import all_flows

ROOT = Path(__file__).parents[2]
STAGES = ("stage1_single_flow", "stage2_dual_flow", "stage3_four_flow")
SIZE = ["--nodes=2", "--gpus-per-node=1"]
# Of a job that is disturbed; of those that are not.
STEPS, HOLD = 14, 4
BRIEF = [phases(4, (32, 4)), "+data.stream.attempts={}"]
SETTINGS = [
    *TINY,
    "stage.global_batch_size=4",
    "hardware.micro_batch_size={32:2}",
    phases(4, (32, STEPS)),
    "log_every_steps=1",
    "checkpoint.every_steps=2",
    "data.stream._target_=tests.slurm.gate.GatedStream",
    f"+data.stream.batches={HOLD}",
]


# A folder that no shell script finds its way to by reading YAML.
DISTURBED = """runs/lr=1e-4, it's ~50% "dïsturbed" #1: x"""


def quoted(value: str) -> str:
    """As a value on Hydra's command line."""
    escaped = value.replace("'", "\\'")
    return f"'{escaped}'"


@dataclass(frozen=True)
class Runs:
    """What the jobs left.

    Attributes:
        jobs: numbers by name: the stages, or "undisturbed" and "disturbed", which are of the last one.
    """

    folder: Path
    jobs: dict[str, str]

    def output(self, name: str) -> str:
        stage = name if name in STAGES else STAGES[2]
        return (self.folder / "logs" / stage / f"{self.jobs[name]}.out").read_text()

    def check(self, ends: dict[str, dict[str, str]]) -> Runs:
        """These, of which every job ended well."""
        for name, end in ends.items():
            assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), f"{name}: {end}\n{self.output(name)}"
        return self

    def losses(self, run: str) -> list[dict[str, object]]:
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        figures = ("loss", "gradient_norm", "learning_rate")
        return [
            {name: value for name, value in json.loads(line).items() if name == "step" or name.startswith(figures)}
            for line in lines
        ]


@pytest.fixture(scope="module")
def settings(checkout: Path) -> list[str]:
    """Overrides that all jobs have in common."""
    return prepare(checkout)


def prepare(checkout: Path) -> list[str]:
    """Write data into a checkout; the overrides with which jobs train on them."""
    (checkout / "gate").mkdir()
    write_pairs(checkout / "pairs", shards=4, count=20)
    return [*SETTINGS, f"data.manifest={checkout}/pairs/manifest", f"+data.stream.gate={checkout}/gate"]


def submit(cluster: Cluster, checkout: Path, script: str, *words: str) -> str:
    """Number of the job that a script of the repository becomes, submitted from a fresh clone's root."""
    options = [word for word in words if word.startswith("-")]
    overrides = [word for word in words if not word.startswith("-")]
    command = ["sbatch", "--parsable", *options, str(ROOT / "slurm" / script), *overrides]
    return cluster.command(*command, cwd=checkout)


def submit_curriculum(cluster: Cluster, checkout: Path, *words: str) -> dict[str, str]:
    """The jobs' numbers by stage, as the script prints them."""
    printed = cluster.command(str(ROOT / "slurm" / "curriculum.sh"), *SIZE, *words, cwd=checkout)
    return dict(re.findall(r"^(\w+): job (\d+), output logs/\1/\2\.out$", printed, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def curriculum(cluster: Cluster, checkout: Path, settings: list[str]) -> Runs:
    """The chained curriculum, from submission to end."""
    jobs = submit_curriculum(cluster, checkout, *settings, *BRIEF)
    assert tuple(jobs) == STAGES
    for stage, before in zip(STAGES[1:], STAGES, strict=False):
        assert cluster.job(jobs[stage])["Dependency"].startswith(f"afterok:{jobs[before]}(")
    return Runs(checkout, jobs).check({stage: cluster.wait(job) for stage, job in jobs.items()})


def test_the_curriculum_runs_to_its_end(curriculum: Runs) -> None:
    for stage, before in zip(STAGES, (None, *STAGES), strict=False):
        steps = [record["step"] for record in curriculum.losses(f"runs/{stage}")]
        assert steps == list(range(1, 5))
        assert (f"starts from runs/{before}/checkpoints/" in curriculum.output(stage)) == (before is not None)
    assert f"attempt 1: 2 ranks on n[1-2], run folder runs/{STAGES[0]}" in curriculum.output(STAGES[0])


def test_a_finished_stage_says_what_comes_next(curriculum: Runs) -> None:
    said = curriculum.output(STAGES[0])
    assert re.search(r"^.*sbatch .*slurm/stage2_dual_flow\.sh", said, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def twice(cluster: Cluster, checkout: Path, settings: list[str]) -> Runs:
    """Stage 3 undisturbed and disturbed, from submission to end."""
    gate = checkout / "gate"

    def stage3(run: str, attempts: int) -> str:
        own = [f"run_dir={quoted(run)}", f"+data.stream.attempts={{{STAGES[2]}:{attempts}}}", "stage.init_from=null"]
        return submit(cluster, checkout, f"{STAGES[2]}.sh", *SIZE, "--partition=low", *settings, *own)

    undisturbed = stage3("runs/undisturbed", 0)
    ends = {"undisturbed": cluster.wait(undisturbed)}
    disturbed = stage3(DISTURBED, 2)
    for rank in range(2):
        cluster.wait_for_file(gate / f"{STAGES[2]}-0-{rank}", disturbed)
    urgent = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    cluster.wait(cluster.command("sbatch", "--parsable", *urgent, cwd=checkout), timeout=120)
    cluster.wait(disturbed, ("RUNNING",), restarts=1)
    # Rank 1 waits for its batch; rank 0 is amid a step, for the gradients of rank 1 are missing.
    cluster.wait_for_file(gate / f"{STAGES[2]}-1-1", disturbed)
    cluster.crash("n2")
    cluster.wait(disturbed, ("PENDING",))
    cluster.boot("n2")
    ends["disturbed"] = cluster.wait(disturbed, restarts=2)
    assert ends["disturbed"]["Restarts"] == "2"
    return Runs(checkout, {"undisturbed": undisturbed, "disturbed": disturbed}).check(ends)


@pytest.mark.slow
def test_a_preempted_job_that_loses_a_node_too_ends_with_the_losses_of_an_undisturbed_one(twice: Runs) -> None:
    output = twice.output("disturbed")
    begun = rf"continues from {re.escape(DISTURBED)}/checkpoints/step-(\d+)"
    starts = [int(step) for step in re.findall(begun, output)]
    assert HOLD <= starts[0] <= HOLD + 2
    # Saved every two steps; the newest save may have been under way.
    assert starts[0] < starts[1] <= starts[0] + HOLD
    assert re.findall(r"attempt (\d): 2 ranks", output) == ["1", "2", "3"]
    losses = twice.losses(DISTURBED)
    assert len(losses) == STEPS
    assert losses == twice.losses("runs/undisturbed")


@pytest.mark.slow
def test_of_two_tasks_of_an_array_with_one_run_folder_one_trains(cluster: Cluster, installed: Path) -> None:
    """On two nodes, which know nothing of each other's processes. The one that trains is stopped, and goes on.

    Every process is a real start of the interpreter.
    """
    checkout, settings = installed, prepare(installed)
    own = ["run_dir=runs/array", f"+data.stream.attempts={{{STAGES[0]}:1}}", "stage.init_from=null"]
    size = ["--nodes=1", "--gpus-per-node=1", "--array=0-1", "--partition=low"]
    array = submit(cluster, checkout, "stage1_single_flow.sh", *size, *settings, *own)
    tasks = [f"{array}_{task}" for task in range(2)]
    states: list[str] = []
    deadline = time.monotonic() + 300
    while "FAILED" not in states and time.monotonic() < deadline:
        time.sleep(0.5)
        states = [cluster.job(task)["JobState"] for task in tasks]
    assert sorted(states) == ["FAILED", "RUNNING"]
    refused, trains = (tasks[states.index(state)] for state in ("FAILED", "RUNNING"))
    cluster.wait_for_file(checkout / "gate" / f"{STAGES[0]}-0-0", trains)
    cluster.command("scancel", "--signal=USR1", trains, cwd=checkout)
    end = cluster.wait(trains, restarts=1)
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0")
    end = cluster.job(refused)
    assert (end["ExitCode"], end["Restarts"]) == ("2:0", "0")
    output = (checkout / "logs" / STAGES[0] / f"{end['JobId']}.out").read_text()
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.match(
        rf"error: run_dir=runs/array: is in use by process \d+ on n[12], job \d+ \(array task {trains[-1]}\)", line
    )
    assert line.endswith("give every task of the job array a run_dir of its own")
    records = (checkout / "runs" / "array" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_every_rank_has_a_log_of_its_own_and_rank_0_speaks_in_the_jobs(twice: Runs) -> None:
    logs = twice.folder / "logs" / STAGES[2] / twice.jobs["disturbed"]
    assert sorted(path.name for path in logs.iterdir()) == ["attempt-1", "attempt-2", "attempt-3"]
    for attempt in logs.iterdir():
        assert sorted(path.name for path in attempt.iterdir()) == ["rank-0.out", "rank-1.out"]
    assert (logs / "attempt-3" / "rank-0.out").read_text() in twice.output("disturbed")


@pytest.mark.slow
@pytest.mark.usefixtures("settings")
def test_latents_and_measures_are_made_on_every_node(cluster: Cluster, checkout: Path) -> None:
    data = ["data=shapes", f"data.manifest={checkout}/pairs/manifest"]
    write_checkpoint(checkout / "model", all_flows(["image", "text"]))
    cache = ["data.latent_cache.resolutions=[32]", "data.latent_cache.folder=latents"]
    latents = submit(cluster, checkout, "precompute_latents.sh", *SIZE, "model=tiny", "hardware=cpu", *data, *cache)
    few = ["samples=4", "batch_size=2", "resolution=32", "steps=2", "flows=[image-to-text]", "device=cpu"]
    own = ["checkpoint=model", "output_dir=measured"]
    measures = submit(cluster, checkout, "evaluate.sh", *SIZE, *own, *data, *few)
    for name, job in (("precompute_latents", latents), ("evaluate", measures)):
        output = checkout / "logs" / name / f"{job}.out"
        assert cluster.wait(job)["ExitCode"] == "0:0", output.read_text()
        assert (output.with_suffix("") / "attempt-1" / "rank-1.out").exists()
    assert len(list((checkout / "latents" / "32").glob("*.safetensors"))) == 4
    assert "image-to-text" in json.loads((checkout / "measured" / "metrics.json").read_text())["flows"]


def test_what_is_missing_is_said_before_anything_starts(cluster: Cluster, checkout: Path, settings: list[str]) -> None:
    words = [*SIZE, *settings, "stage.init_from=runs/nowhere", "run_dir=runs/refused", "hardware.loader_workers=3"]
    job = submit(cluster, checkout, "stage3_four_flow.sh", *words, "+data.stream.attempts={}")
    end = cluster.wait(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    lines = (checkout / "logs" / STAGES[2] / f"{job}.out").read_text().splitlines()
    (error,) = (line for line in lines if "error" in line)
    assert "stage.init_from=runs/nowhere: does not exist" in error
    assert any(re.search(r"warning: data\.manifest=.*: 4 shards, fewer than 2 .*3", line) for line in lines)
    assert not (checkout / "runs/refused").exists()


def test_a_stage_that_fails_takes_the_rest_of_the_curriculum_along(
    cluster: Cluster, checkout: Path, settings: list[str]
) -> None:
    jobs = submit_curriculum(cluster, checkout, *settings, "+data.stream.attempts={}", "stage.learning_rate=-1")
    assert [cluster.wait(job)["JobState"] for job in jobs.values()] == ["FAILED", "CANCELLED", "CANCELLED"]


def test_a_signal_to_the_batch_script_alone_reaches_every_rank(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    """As that of `sbatch --signal=B:USR1`. All ranks end with the status, though srun ends those that come last."""
    script = tmp_path / "job.sh"
    run = f"source slurm/job.sh; on_all_ranks tests.slurm.saves {tmp_path}; echo status $status"
    script.write_text(f"#!/usr/bin/env bash\n{run}\n")
    output = ["--job-name=stage3_four_flow", "--output=logs/%x/%j.out", "--exclusive"]
    job = cluster.command("sbatch", "--parsable", *SIZE, *output, str(script), cwd=checkout)
    for rank in range(2):
        cluster.wait_for_file(tmp_path / f"waits-{rank}", job)
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    logs = checkout / "logs" / STAGES[2]
    lines = (logs / f"{job}.out").read_text().splitlines()
    assert "rank 0 has saved" in lines
    assert "rank 1 has saved" not in lines
    other = f"logs/{STAGES[2]}/{job}/attempt-1/rank-1.out:error: of every rank"
    assert [line for line in lines if "error: of every rank" in line] == ["error: of every rank", other]
    assert lines[-1] == "status 75"
    assert (logs / job / "attempt-1" / "rank-1.out").read_text().startswith("rank 1 has saved")


def test_a_job_out_of_the_queues_hands_saves_and_stays_ended(
    cluster: Cluster, checkout: Path, settings: list[str]
) -> None:
    """By the very commands of docs/slurm.md."""
    commands = [command.text for command in of_page("docs/slurm.md") if "1234" in command.text]
    attempts = f"+data.stream.attempts={{{STAGES[0]}:1}}"
    job = submit(cluster, checkout, f"{STAGES[0]}.sh", *SIZE, *settings, "run_dir=runs/stopped", attempts)
    for rank in range(2):
        cluster.wait_for_file(checkout / "gate" / f"{STAGES[0]}-0-{rank}", job)
    for program in ("scontrol", "scancel"):
        (command,) = [text for text in commands if text.startswith(f"{program} ")]
        cluster.command(*shlex.split(command.replace("1234", job)))
    assert cluster.wait(job)["ExitCode"] == "75:0"
    output = (checkout / "logs" / STAGES[0] / f"{job}.out").read_text()
    assert "not requeued: the job has requeue=0" in output
    assert (checkout / "runs" / "stopped" / "checkpoints" / "latest").exists()


@pytest.mark.slow
def test_an_array_downloads_every_part_once(cluster: Cluster, checkout: Path) -> None:
    settings = ["data=shapes", "data.root=drawn", "data.shapes.images=60"]
    for command in (["miniature", "draw"], ["data_pipeline", "select"]):
        cluster.command(program_of_tests("python"), "-m", *command, *settings, cwd=checkout)
    shared = ["--nodelist=n1", "--cpus-per-task=1", "--mem=1000"]
    serve = f"--wrap={sys.executable} -m miniature serve {' '.join(settings)}"
    server = cluster.command("sbatch", "--parsable", *shared, "--output=/dev/null", serve, cwd=checkout)
    cluster.wait_for_port("n1", 8765)
    job = submit(cluster, checkout, "download_shards.sh", *shared, "--array=0-1", *settings)
    outputs = []
    for task in range(2):
        assert cluster.wait(f"{job}_{task}")["ExitCode"] == "0:0"
        outputs.append((checkout / "logs" / "download_shards" / f"{job}-{task}.out").read_text())
    cluster.command("scancel", server)
    # The images, drawn with a fixed seed, are in two parts, one of each source.
    assert ["36 of 36 images" in output for output in outputs] == [True, False]
    assert ["24 of 24 images" in output for output in outputs] == [False, True]
    assert len(list((checkout / "drawn" / "shards").rglob("*.tar"))) == 2


def test_part_of_an_array_is_refused(cluster: Cluster, checkout: Path) -> None:
    job = submit(cluster, checkout, "download_shards.sh", "--array=1-2", "--cpus-per-task=1")
    assert cluster.wait(f"{job}_1")["ExitCode"] == "2:0"
    output = (checkout / "logs" / "download_shards" / f"{job}-1.out").read_text()
    assert "error: --array: tasks 1 to 2, 2 of them" in output
