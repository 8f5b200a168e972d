"""How a process learns its place among the others; the exchanges themselves are tested with the engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.programs import program
from vdtrain.commands.train import main as train
from vdtrain.run import distributed, ranks

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM_STEP = {
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_JOB_ID": "40001",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any launcher in it."""
    others = {*ranks.TORCHRUN_VARIABLES, *ranks.FOREIGN_LAUNCHERS, *ranks.FOREIGN_LAUNCHERS.values()}
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in others]:
        monkeypatch.delenv(name)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)


def test_plain_start_is_one_process(environment: pytest.MonkeyPatch) -> None:
    assert ranks.launch_variables() == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def test_torchrun_comes_before_slurm(environment: pytest.MonkeyPatch) -> None:
    set_all(environment, SLURM_STEP | TORCHRUN)
    assert ranks.launch_variables() == TORCHRUN


def test_incomplete_torchrun_names_what_is_missing(environment: pytest.MonkeyPatch) -> None:
    set_all(environment, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    with pytest.raises(ValueError, match=r"MASTER_ADDR, MASTER_PORT not set.*torchrun"):
        ranks.launch_variables()


def test_slurm_step(environment: pytest.MonkeyPatch) -> None:
    """It needs no program of Slurm, which a container may lack."""
    set_all(environment, SLURM_STEP | {"PATH": ""})
    found = ranks.launch_variables()
    assert found == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(ranks.FIRST_PORT + 40003 % ranks.PORTS),
    }


NODE_LISTS = {
    "gpu-07": "gpu-07",
    "gpu[07-10,12],login1": "gpu07",
    "gpu[3,1]": "gpu3",
    "login1,gpu[07-10]": "login1",
    "rack[1-2]gpu[07-08]": "rack1gpu07",
    "gpu-ib[0007-0010]": "gpu-ib0007",
}


@pytest.mark.parametrize("nodes", NODE_LISTS)
def test_the_processes_of_a_step_meet_at_its_first_node(environment: pytest.MonkeyPatch, nodes: str) -> None:
    set_all(environment, SLURM_STEP | {"SLURM_JOB_NODELIST": nodes})
    assert ranks.launch_variables()["MASTER_ADDR"] == NODE_LISTS[nodes]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs Slurm's scontrol")
def test_slurm_itself_names_the_same_first_node(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = tmp_path / "slurm.conf"
    settings.write_text("ClusterName=c\nSlurmctldHost=localhost\nNodeName=n1\n")
    environment.setenv("SLURM_CONF", str(settings))
    for nodes, first in NODE_LISTS.items():
        named = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        assert named.stdout.split()[0] == first


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"SLURM_JOB_NODELIST": ""}, "launcher: SLURM_JOB_NODELIST=: not a list of nodes; set MASTER_ADDR"),
        ({"SLURM_JOB_NODELIST": "gpu[07"}, "launcher: SLURM_JOB_NODELIST=gpu[07: not a list of nodes; set MASTER_ADDR"),
        ({"SLURM_LOCALID": ""}, "launcher: SLURM_LOCALID is not set beside SLURM_PROCID; let srun start the processes"),
        ({"SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": ""}, "launcher: SLURM_PROCID=9: SLURM_STEP_NUM_TASKS or"),
    ],
)
def test_variables_of_slurm_that_a_wrapper_took_away_are_one_line(
    environment: pytest.MonkeyPatch, changes: dict[str, str], line: str
) -> None:
    set_all(environment, SLURM_STEP | changes)
    with pytest.raises(ValueError, match=re.escape(line)):
        ranks.launch_variables()


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("9", 0)])
def test_one_process_of_a_step_says_what_is_wrong_for_all(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, said: int
) -> None:
    set_all(environment, SLURM_STEP | {"SLURM_PROCID": rank, "SLURM_JOB_NODELIST": ""})
    assert train([]) == 2
    assert capsys.readouterr().err.count("error: launcher: SLURM_JOB_NODELIST=: not a list of nodes") == said


def test_slurm_batch_script_is_one_process(environment: pytest.MonkeyPatch) -> None:
    batch = {name: value for name, value in SLURM_STEP.items() if "STEP" not in name}
    set_all(environment, batch | {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"})
    assert ranks.launch_variables()["WORLD_SIZE"] == "1"


def test_a_step_on_some_of_a_jobs_nodes_meets_at_its_own_first_one(environment: pytest.MonkeyPatch) -> None:
    set_all(environment, SLURM_STEP | {"SLURM_STEP_NODELIST": "gpu08"})
    assert ranks.launch_variables()["MASTER_ADDR"] == "gpu08"


def test_interactive_shell_of_an_allocation_is_one_process(environment: pytest.MonkeyPatch) -> None:
    set_all(environment, SLURM_STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"})
    assert ranks.launch_variables()["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
        {"MV2_COMM_WORLD_SIZE": "2"},
        # Open MPI starts its helper on another node by srun, and hands down what Slurm set for that.
        SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "2"},
        {"SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "PMI_SIZE": "2"},
    ],
)
def test_a_launcher_that_is_not_read_is_refused(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    set_all(environment, variables)
    with pytest.raises(ValueError, match=r"launcher: \w+_SIZE=2: mpirun started.*use torchrun or srun"):
        ranks.launch_variables()


def test_what_srun_sets_for_mpi_is_no_other_launcher(environment: pytest.MonkeyPatch) -> None:
    step = SLURM_STEP | {"SLURM_JOB_NODELIST": "gpu-07"}
    set_all(environment, step | {"PMI_SIZE": "16", "PMI_RANK": "9"})
    assert ranks.launch_variables()["RANK"] == "9"
    set_all(environment, TORCHRUN | {"OMPI_COMM_WORLD_SIZE": "4"})
    assert ranks.launch_variables() == TORCHRUN


def test_mpirun_without_torchruns_variables_is_one_line(environment: pytest.MonkeyPatch) -> None:
    command = [program("vdtrain"), "train", "model=tiny", "data=shapes", "hardware=cpu"]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert [output for output, _ in printed] == ["", ""]
    assert printed[0][1].startswith("error: launcher: OMPI_COMM_WORLD_SIZE=2: ")
    assert printed[0][1].count("\n") == 1
    assert printed[1][1] == ""


def test_devices(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"hardware\.device.*neither"):
        distributed.start("tpu")
    environment.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"hardware\.device.*no GPU"):
        distributed.start("cuda")
    set_all(environment, TORCHRUN | {"LOCAL_RANK": "2"})
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"hardware\.device: process 2.*2 GPUs"):
        distributed.start("cuda")


def test_alone_there_is_nobody_to_ask() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_agree(True)
    assert not distributed.all_agree(False)
    assert distributed.gather_json("word") == ["word"]
    assert distributed.broadcast_json("word") == "word"
