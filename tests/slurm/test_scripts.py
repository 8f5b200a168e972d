"""What can be said of the batch scripts without a cluster."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.__main__ import main as data_pipeline_main
from vdtrain.cli import main as vdtrain_main
from vdtrain.commands.run_folder import main as run_folder_main

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
STAGES = {
    name: ROOT / "slurm" / f"{name}.sh" for name in ("stage1_single_flow", "stage2_dual_flow", "stage3_four_flow")
}
DATA = {
    "select_metadata": "select",
    "download_shards": "download",
    "index_shards": "index",
    "precompute_latents": "latents",
}
BATCH = [path for path in SCRIPTS if "#SBATCH" in path.read_text()]
PAGES = [ROOT / "README.md", ROOT / "docs" / "slurm.md"]


def submissions() -> list[str]:
    """Commands of the documents that submit something."""
    text = "\n".join(block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL))
    lines = (line.partition("  #")[0].strip() for line in text.splitlines())
    return sorted({line for line in lines if re.search(r"^(sbatch .*)?slurm/\w+\.sh", line)})


def commands(script: str) -> list[tuple[Callable[[list[str]], int], list[str]]]:
    """What the jobs of a script call with the overrides that it is given."""
    if script in DATA:
        return [(data_pipeline_main, [DATA[script]])]
    if script == "evaluate":
        return [(vdtrain_main, ["evaluate"])]
    return [(vdtrain_main, ["train", f"stage={stage}"]) for stage in STAGES if script in (stage, "curriculum", "all")]


def test_the_stages_differ_in_name_and_size_alone() -> None:
    texts = {path.read_text().replace(name, "STAGE") for name, path in STAGES.items()}
    assert len({re.sub(r"--nodes=\d+", "--nodes=N", text) for text in texts}) == 1
    assert all(text.count("\n") <= 60 for text in texts)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "--external-sources", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_every_job_finds_its_folder_of_logs_in_a_fresh_clone(script: Path) -> None:
    name = re.search(r"^#SBATCH --job-name=(\w+)$", script.read_text(), re.MULTILINE)
    assert name is not None
    assert name[1] == script.stem
    tracked = subprocess.run(["git", "ls-files", f"logs/{name[1]}"], cwd=ROOT, capture_output=True, text=True)
    # A source archive has no repository around it.
    assert tracked.stdout.strip() == f"logs/{name[1]}/.gitignore" or tracked.returncode != 0
    assert (ROOT / "logs" / name[1]).is_dir()


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_a_job_script_that_is_not_submitted_says_how(script: Path, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "SLURM_SUBMIT_DIR: is not set: submit this script with sbatch" in done.stderr
    elsewhere = environment | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", script], cwd=ROOT, env=elsewhere, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path}: not the repository's root; call sbatch from there\n",
    )


def test_a_signal_while_the_last_lines_are_copied_does_not_end_the_job(tmp_path: Path) -> None:
    """It would not go back into the queue. What the ranks said is still on its way when they have ended."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    for name, lines in {"srun": "exit 75", "tail": "echo copying\nsleep 2"}.items():
        program = tmp_path / ".venv" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NAME": "job", "JOB_NUM_NODES": "1", "CPUS_ON_NODE": "2", "GPUS_PER_NODE": "2"}
    script = 'set -euo pipefail; source slurm/job.sh; on_all_ranks command; echo "status $status"'
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", **{f"SLURM_{name}": value for name, value in job.items()}},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "copying\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "status 75\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("run_dir=here", "every stage has its own"),
        ("stage=stage2_dual_flow", "every stage has its own"),
        ("gpu", "neither --OPTION=VALUE for sbatch nor SETTING=VALUE"),
    ],
)
def test_the_curriculum_refuses_what_the_stages_cannot_share(argument: str, reason: str) -> None:
    done = subprocess.run(["slurm/curriculum.sh", argument], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {argument}: {reason}")


@pytest.mark.parametrize("command", submissions())
def test_submissions_in_the_documents_are_ones_that_work(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    (script,) = [word for word in words if word.endswith(".sh")]
    assert (ROOT / script).is_file()
    # What slurm/all.sh takes for itself and for sbatch.
    overrides = [word for word in words[words.index(script) + 1 :] if not re.match(r"from=|(\w+:)?-", word)]
    for main, command in commands(Path(script).stem):
        assert main([*command, *overrides, "--cfg", "job"]) == 0, capsys.readouterr().err


def test_the_paths_that_a_site_may_set_are_settings(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"^# (DATA|RUN)_OVERRIDES=\((.+)\)$", (ROOT / "slurm" / "env.sh").read_text(), re.MULTILINE)
    lists = {name: shlex.split(words) for name, words in examples}
    assert data_pipeline_main(["download", *lists["DATA"], "--cfg", "job"]) == 0, capsys.readouterr().err
    assert vdtrain_main(["train", *lists["DATA"], *lists["RUN"], "--cfg", "job"]) == 0, capsys.readouterr().err


def test_the_documents_submit() -> None:
    assert len(submissions()) >= 6


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "j", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "8"}


def source_job(**variables: str) -> subprocess.CompletedProcess[str]:
    """What job.sh makes of a job's variables."""
    environment = {"PATH": "/usr/bin:/bin", **JOB, "SLURM_GPUS_PER_NODE": "2", **variables}
    code = "set -euo pipefail; source slurm/job.sh; echo $ranks_per_node $ranks $attempt"
    return subprocess.run(["bash", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variables", "answer"),
    [
        ({"SLURM_GPUS_PER_NODE": "8"}, "8 16 1"),
        ({"SLURM_GPUS_PER_NODE": "a100:8"}, "8 16 1"),
        ({"SLURM_GPUS_PER_NODE": "a100:2,h100:1"}, "3 6 1"),
        ({"SLURM_RESTART_COUNT": "4"}, "2 4 5"),
    ],
    ids=str,
)
def test_the_size_of_a_job_is_read_from_its_variables(variables: dict[str, str], answer: str) -> None:
    assert source_job(**variables).stdout == f"{answer}\n"


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("SLURM_GPUS_PER_NODE", "a100", "submit with --gpus-per-node=[TYPE:]N"),
        ("SLURM_JOB_ID", "4711_1", "submit with sbatch"),
        ("SLURM_JOB_NUM_NODES", "two", "submit with sbatch"),
        ("SLURM_CPUS_ON_NODE", "8(x2)", "submit with sbatch"),
        ("SLURM_RESTART_COUNT", "x", "submit with sbatch"),
    ],
)
def test_a_variable_that_is_no_number_is_one_line(name: str, value: str, remedy: str) -> None:
    done = source_job(**{name: value})
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {name}={value}: no")
    assert line.endswith(remedy)


@pytest.mark.parametrize("folder", ["""it's "lr=1e-4", ~a: b #ünï/図 100% [c]{d}""", "--flag"])
def test_the_run_folder_comes_as_one_line_whatever_its_name(folder: str) -> None:
    """And the record of restarts, to which the batch script hands it, takes it."""
    escaped = folder.replace("'", "\\'")
    code = """run_dir=$("$PYTHON" -m vdtrain.commands.run_folder "$1") && printf '<%s>' "$run_dir"
        "$PYTHON" -m vdtrain.run.restarts -- "$run_dir" """
    command = ["bash", "-c", code, "bash", f"run_dir='{escaped}'"]
    environment = {**os.environ, "PYTHON": sys.executable, "LC_ALL": "C"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.stdout == f"<{folder}>"
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith(f"not requeued: {folder}: the trainer has not begun there")


def test_a_run_folder_that_cannot_be_said_in_a_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_folder_main(['run_dir="a\nb"']) == 2
    assert run_folder_main(["run_dir=''"]) == 2
    assert run_folder_main(["stage=none"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line[:12] for line in shown.err.splitlines()] == ["error: run_d", "error: run_d", "error: stage"]
