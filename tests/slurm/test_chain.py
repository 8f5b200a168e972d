"""The cluster's whole way: examples/first_hour/reproduce.sh on a real cluster, and its chain submitted again."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clones import make_clone
from tests.slurm.cluster import Cluster
from vdtrain.data.manifest import Manifest

STEPS = (
    *("select_metadata", "download_shards", "index_shards", "precompute_latents"),
    *("stage1_single_flow", "stage2_dual_flow", "stage3_four_flow"),
)
IMAGES = 120


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def transcript(cluster: Cluster, clone: Path) -> str:
    """What the script prints."""
    done = subprocess.run(
        ["bash", "examples/first_hour/reproduce.sh", "--partition=low"],
        cwd=clone,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=540,
    )
    outputs = "\n".join(f"--- {path}\n{path.read_text()}" for path in sorted(clone.glob("logs/*/*.out")))
    assert done.returncode == 0, f"{done.stdout}\n{outputs}"
    return done.stdout


def jobs_in(printed: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+): job (\d+), .*output logs/\1/\2", printed, flags=re.MULTILINE))


def chain(transcript: str) -> list[str]:
    """The words of the chain's command, as the transcript shows it."""
    (line,) = re.findall(r"^\$ (slurm/all\.sh .*)$", transcript, flags=re.MULTILINE)
    return re.sub("'", "", line).split()


@pytest.mark.slow
def test_a_chain_leads_from_metadata_to_a_picture(cluster: Cluster, clone: Path, transcript: str) -> None:
    jobs = jobs_in(transcript)
    assert tuple(jobs) == STEPS
    for job in jobs.values():
        assert cluster.job(job)["ExitCode"] == "0:0"
    root = clone / "demo" / "reproduce"
    assert int(Manifest(root / "data" / "manifest").samples.sum()) == IMAGES
    assert list((root / "data" / "latents" / "32").glob("*.safetensors"))
    for stage in STEPS[4:]:
        steps = [json.loads(line)["step"] for line in (root / "runs" / stage / "metrics.jsonl").open()]
        assert steps == [1, 2, 3, 4]
    assert (root / "samples" / "0000.png").exists()
    assert (root / "runs" / "report.html").exists()


@pytest.mark.slow
def test_a_complete_chain_submitted_again_does_nothing_anew(cluster: Cluster, clone: Path, transcript: str) -> None:
    jobs = jobs_in(cluster.command(*chain(transcript), cwd=clone))
    assert tuple(jobs) == STEPS
    ends = {step: cluster.wait(job) for step, job in jobs.items()}
    assert {step: end["ExitCode"] for step, end in ends.items()} == dict.fromkeys(STEPS, "0:0")
    assert ", 0 of them new" in (clone / "logs" / "index_shards" / f"{jobs['index_shards']}.out").read_text()
    metrics = clone / "demo" / "reproduce" / "runs" / STEPS[-1] / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 4


@pytest.fixture
def waiting(cluster: Cluster) -> Iterator[list[str]]:
    """Options of jobs that wait: their partition starts nothing. None of them is left."""
    cluster.command("scontrol", "update", "partitionname=low", "state=down")
    yield ["--partition=low", "--comment=waiting"]
    cluster.command("scancel", "--partition=low", "--state=PENDING")
    cluster.command("scontrol", "update", "partitionname=low", "state=up")


def test_the_same_command_keeps_what_is_in_the_queue_and_submits_the_rest(
    cluster: Cluster, clone: Path, waiting: list[str]
) -> None:
    words = ["slurm/all.sh", *waiting, "gpu:--gpus-per-node=1", "gpu:--nodes=2", "stage1_single_flow:--nodes=1"]
    words += ["cpu:--cpus-per-task=2", "download_shards:--array=0-1", "data=shapes", "data.latents=cached"]
    words += ["model=tiny", "hardware=cpu", "stage.learning_rate=1e-5"]
    first = jobs_in(cluster.command(*words, cwd=clone))
    assert tuple(first) == STEPS
    known = {step: cluster.job(job) for step, job in first.items()}
    for step, before in zip(STEPS[1:], STEPS, strict=False):
        assert known[step]["Dependency"].startswith(f"afterok:{first[before]}")
    # Every job has the options and settings that are its own.
    assert [known[step]["NumNodes"].partition("-")[0] for step in STEPS] == ["1", "1", "1", "2", "1", "2", "2"]
    assert [known[step]["CPUs/Task"] for step in STEPS[:3]] == ["2", "2", "2"]
    scripts = {step: known[step]["Command"].partition("/slurm/")[2] for step in STEPS}
    assert scripts == {step: f"{step}.sh" for step in STEPS}
    # What somebody took out of the queue is submitted again, and what stays is not.
    cluster.command("scancel", first[STEPS[-1]])
    printed = cluster.command(*words, cwd=clone)
    second = jobs_in(printed)
    assert printed.count("in the queue already") == len(STEPS) - 1
    assert {step for step in STEPS if first[step] != second[step]} == {STEPS[-1]}
    assert cluster.job(second[STEPS[-1]])["Dependency"].startswith(f"afterok:{first[STEPS[-2]]}")
    # Steps before one that waits are complete, whatever has become of their jobs.
    cluster.command("scontrol", "update", f"jobid={first[STEPS[1]]}", "dependency=")
    cluster.command("scancel", first[STEPS[0]])
    assert f"{STEPS[0]}: job {first[STEPS[0]]}, complete" in cluster.command(*words, cwd=clone)
    # Other words are another chain.
    other = jobs_in(cluster.command(*words, "from=stage3_four_flow", cwd=clone))
    assert other.keys() == {STEPS[-1]}
    assert other[STEPS[-1]] != second[STEPS[-1]]


def test_a_data_job_before_its_time_limit_goes_back_into_the_queue(cluster: Cluster, clone: Path) -> None:
    """Its command stops at the signal, in the midst of a download from a server that never answers."""
    words = ["data=shapes", "data.root=demo/waiting", "data.shapes.images=24", "data.download.timeout=100"]
    python = str(clone / ".venv/bin/python")
    for command in (["miniature", "draw"], ["data_pipeline", "select"]):
        cluster.command(python, "-m", *command, *words, cwd=clone)
    options = ["--parsable", "--array=0-0", "--nodelist=n1", "--cpus-per-task=1", "--mem=2000"]
    silent = "import socket,time; s=socket.create_server(('127.0.0.1',8765)); time.sleep(600)"
    server = cluster.command(
        *["sbatch", "--parsable", "--nodelist=n1", "--mem=100", "--output=/dev/null"],
        f'--wrap={python} -c "{silent}"',
        cwd=clone,
    )
    cluster.wait_for_port("n1", 8765)
    job = cluster.command("sbatch", *options, "slurm/download_shards.sh", *words, cwd=clone)
    cluster.wait_for_file(clone / "demo/waiting/shards/laion2b_en/00000.plan.json", job)
    cluster.command("scancel", "--batch", "--signal=USR1", f"{job}_0")
    cluster.wait(f"{job}_0", ("PENDING", "RUNNING"), restarts=1)
    output = (clone / "logs" / "download_shards" / f"{job}-0.out").read_text()
    assert "stopped by SIGTERM; run it again to continue" in output
    assert "goes back into the queue after attempt 1" in output
    cluster.command("scancel", job, server)


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("from=download", "no such step; choose from select_metadata download_shards"),
        ("train:--nodes=2", "no such step; choose from cpu gpu select_metadata"),
        ("run_dir=here", "every stage has its own"),
        ("stage.learnig_rate=1", "no such setting; did you mean 'stage.learning_rate'"),
        ("data.select.filters.side=1", "no such setting"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_submitted(
    cluster: Cluster, clone: Path, argument: str, reason: str
) -> None:
    done = subprocess.run(
        ["slurm/all.sh", argument], cwd=clone, env=cluster.environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert argument.partition("=")[0] in line
    assert reason in line
    assert done.stdout == ""
