"""Commands that start their processes themselves, as typed: their ends, signals, mistakes, several nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cases import with_slow
from tests.pairs import write_pairs
from tests.programs import free_port, program
from tests.settings import TINY, phases
from tests.training.test_launching import wait_until
from vdtrain.commands import train
from vdtrain.run import elastic
from vdtrain.run.restarts import read_events

STAGE = [
    *("stage=stage1_single_flow", *TINY, "stage.init_from=null", "stage.global_batch_size=2"),
    *("hardware.micro_batch_size={32:1,64:1}", "log_every_steps=1", "samples.every=null"),
    "data.stream._target_=vdtrain.data.stream.PairStream",
]
LONG = phases(2, (32, 100_000))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), count=10)


class Started:
    """A command that runs, its output and its processes; all of them are gone at the end of the test."""

    def __init__(self, folder: Path, words: list[str], name: str = "log") -> None:
        self.log = folder / name
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK"))}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([program("vdtrain"), *words], stdout=log, stderr=log, cwd=folder, env=clean)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def ranks(self) -> list[psutil.Process]:
        """The processes of its ranks, by rank."""
        found = {}
        for each in psutil.process_iter():
            try:
                variables, words = each.environ(), each.cmdline()
            except psutil.Error:
                continue
            ours = (
                variables.get("TORCHELASTIC_RUN_ID") == elastic.OWN_RUN
                and f"run_dir={self.log.parent / 'run'}" in words
            )
            if ours and "RANK" in variables:
                found[int(variables["RANK"])] = each
        return [found[rank] for rank in sorted(found)]

    def reach(self, text: str) -> None:
        wait_until(lambda: text in self.said or self.process.poll() is not None, 240)
        assert text in self.said

    def end(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def begin(tmp_path: Path, data: Path) -> Iterator[type[Started]]:
    made: list[Started] = []

    class Begun(Started):
        def __init__(self, *words: str, name: str = "log") -> None:
            super().__init__(
                tmp_path, ["train", *STAGE, f"data.manifest={data}", f"run_dir={tmp_path / 'run'}", *words], name
            )
            made.append(self)

    yield Begun  # type: ignore[misc]
    for each in made:
        each.process.kill()
        each.process.wait()


def test_signals_reach_all_processes_and_the_same_command_goes_on(begin: type[Started], tmp_path: Path) -> None:
    """The statuses are those of one process, and nothing but its lines is said."""
    steps = 0
    for number, status in ((signal.SIGUSR1, 75), (signal.SIGINT, 130), (signal.SIGTERM, 75)):
        run = begin("gpus=2", LONG)  # type: ignore[call-arg, arg-type]
        run.reach(f"step {steps + 2} |")
        run.process.send_signal(number)
        assert run.end() == status, run.said
        saved = re.search(r"saved step (\d+); the same command goes on\n", run.said)
        assert saved, run.said
        assert int(saved[1]) >= steps + 2
        steps = int(saved[1])
        assert "warning" not in run.said
        assert "error" not in run.said
    assert "until now" not in run.said
    new = ["watchdog_seconds=300", "stage.learning_rate=1e-5"]
    run = begin("gpus=2", phases(2, (32, steps + 2)), *new)  # type: ignore[call-arg, arg-type]
    assert run.end() == 0, run.said
    assert "\nwatchdog_seconds=300: was 600 until now\n" in run.said
    assert re.search(r"(?m)^warning: stage\.learning_rate=1e-05: was \S+ until now$", run.said), run.said
    assert f"\nrun folder: {tmp_path / 'run'}\n2 processes on 1 node, each on the CPU (" in run.said
    assert re.search(r"\nparameters: [\d,]+ trained, 0 carried along unchanged, [\d,]+ in frozen encoders", run.said)
    times = re.findall(rf"(?m)^(\d\d:\d\d:\d\d) \| step {steps + 1} \| .* \| (\d+) s left$", run.said)
    assert len(times) == 1, run.said
    # Nothing is left after the last step.
    assert re.search(rf"(?m)\| step {steps + 2} \| .* \| \d+ s since the start$", run.said), run.said
    assert [event.world_size for event in read_events(tmp_path / "run")] == [2] * 4
    assert re.search(r"is complete; next: vdtrain train stage=stage2_dual_flow .*gpus=2", run.said)
    assert not re.search(r"(?i)torch\.distributed|elastic", run.said)


def test_a_killed_process_is_one_line(begin: type[Started]) -> None:
    run = begin("gpus=2", LONG)  # type: ignore[call-arg, arg-type]
    run.reach("step 2 |")
    first, second = run.ranks()
    second.send_signal(signal.SIGRTMIN)  # the test's programs are killed by it
    assert run.end() == 1
    (line,) = [
        line for line in run.said.splitlines() if not re.match(r"\d\d:|stage1|run folder|2 p|micro-|param", line)
    ]
    assert line == (
        "error: process 1 was ended by SIGKILL, as by the system when memory runs out (see `dmesg`); the same command "
        "continues"
    )
    wait_until(lambda: not first.is_running())


def test_an_error_of_the_processes_is_one_line(begin: type[Started]) -> None:
    run = begin("gpus=2", LONG, "stage.init_from=nowhere")  # type: ignore[call-arg, arg-type]
    assert run.end() == 2
    assert run.said.count("\n") == 1, run.said
    assert run.said.startswith("error: stage.init_from=nowhere: does not exist")


def test_two_nodes_meet(begin: type[Started], tmp_path: Path) -> None:
    place = [f"rendezvous=localhost:{free_port()}", "nnodes=2", "gpus=1", phases(2, (32, 2))]
    nodes = [begin(*place, f"node_rank={node}", name=f"node{node}") for node in range(2)]  # type: ignore[call-arg, arg-type]
    assert [node.end() for node in nodes] == [0, 0], [node.said for node in nodes]
    assert "step 2 |" in nodes[0].said
    assert "step" not in nodes[1].said
    place[0], place[-1] = f"rendezvous=localhost:{free_port()}", phases(2, (32, 4))
    nodes = [begin(*place, name=f"agreed{node}") for node in range(2)]  # type: ignore[call-arg, arg-type]
    assert [node.end() for node in nodes] == [0, 0], [node.said for node in nodes]
    assert sum("step 4 |" in node.said for node in nodes) == 1
    assert [event.world_size for event in read_events(tmp_path / "run")] == [2, 2]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    with_slow(
        {
            # It made weights that nobody wanted.
            "learning rate": ("stage.learning_rate", "0.0001", "0.5"),
            # One of the two waited for the other.
            "looks": ("samples.every", "null", "8"),
            "saves": ("checkpoint.every_steps", "200", "1"),
            "images": ("data.flip", "false", "true"),
            "only there": ("objective.flow_weights.image-to-image", "unset", "2"),
        },
        ["learning rate"],
    ),
)
def test_nodes_whose_commands_differ_are_one_line(
    begin: type[Started], tmp_path: Path, name: str, first: str, second: str
) -> None:
    """What may differ does: threads, places, and the number of the node."""
    place = [f"rendezvous=localhost:{free_port()}", "nnodes=2", "gpus=1", phases(2, (32, 2))]
    (tmp_path / "link").symlink_to(tmp_path / "run")
    own = [["hardware.threads=1"], [f"run_dir={tmp_path}/link", "hardware.loader_workers=3", f"++{name}={second}"]]
    nodes = [
        begin(*place, f"node_rank={node}", *own[node], name=f"node{node}")  # type: ignore[call-arg, arg-type]
        for node in range(2)
    ]
    assert [node.end() for node in nodes] == [2, 2], [node.said for node in nodes]
    line = f"error: {name}={first}: process 1 has {second}; give all processes the same settings\n"
    assert nodes[0].said == line
    assert not (tmp_path / "run").exists()


def test_a_port_that_another_program_has_is_one_line(begin: type[Started]) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        words = ["nnodes=2", "gpus=1", "node_rank=0", f"rendezvous=127.0.0.1:{other.getsockname()[1]}"]
        run = begin(*words)  # type: ignore[call-arg, arg-type]
        assert run.end() == 1
    assert run.said == f"error: {words[-1]}: another program listens there; give another port\n"


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["gpus=8"], TORCHRUN, "gpus=8: this runs under torchrun, and it has started the processes; take gpus out"),
        (
            ["gpus=8"],
            {"SLURM_JOB_ID": "7"},
            "gpus=8: this runs under Slurm, and srun starts the processes of a job; take",
        ),
        (["nnodes=2"], {"SLURM_JOB_ID": "7"}, "nnodes=2: this runs under Slurm"),
        (["nnodes=2"], {}, "nnodes=2: add gpus=N, the number of processes of each node"),
        (["nnodes=2", "gpus=8"], {}, "nnodes=2: add rendezvous=HOST:PORT"),
        (["gpus=8", "rendezvous=a:1"], {}, "rendezvous=a:1: one node meets no other; add nnodes=N"),
        (["nnodes=2", "gpus=1", "rendezvous=node1"], {}, "rendezvous=node1: not HOST:PORT, such as node1:29500"),
        (["nnodes=2", "gpus=1", "rendezvous=node1:70000"], {}, "rendezvous=node1:70000: not HOST:PORT"),
        (["nnodes=2", "gpus=1", "rendezvous=a:1", "node_rank=2"], {}, "node_rank=2: nnodes=2, and they count from 0"),
        (["gpus=0"], {}, "gpus=0: must be at least 1"),
        # It does not divide the batch of two.
        (["gpus=3"], {}, "stage.global_batch_size=2: "),
        (["gpus=3", "hardware.device=cuda", "stage.global_batch_size=3"], {}, "gpus=3: PyTorch finds"),
    ],
)
def test_mistakes_come_before_any_process(
    words: list[str],
    variables: dict[str, str],
    said: str,
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert train.main([*STAGE, f"data.manifest={data}", f"run_dir={tmp_path}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


SMI = """#!/bin/sh
echo '0, GPU-aa, 4, 81559'
echo '1, GPU-bb, 70000, 81559'
echo '2, GPU-cc, 4, 81559'
"""


def test_one_process_beside_idle_gpus_says_so(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RANK", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(name)
    words = [*STAGE, f"run_dir={tmp_path / 'run'}", f"data.manifest={data}", "stage.init_from=nowhere"]
    note = (
        "warning: 2 GPUs of this machine are idle, and one process uses one of them; gpus=2 takes all of them, gpus=1"
    )
    for more, expected in ((["hardware.device=cuda"], True), (["hardware.device=cuda", "gpus=1"], False), ([], False)):
        train.main([*words, *more])
        assert (note in capsys.readouterr().err) == expected
    for visible, count in (("0", 1), ("0,1", 1), ("0,2", 2), ("GPU-cc,GPU-aa", 2), ("", 0)):
        assert elastic.idle_gpus({"CUDA_VISIBLE_DEVICES": visible}) == count


def test_words_are_those_that_were_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", ["python", "-X", "dev", "/bin/vdtrain", "train", "gpus=2"])
    assert elastic.words_of("train", ["gpus=2"]) == ["-X", "dev", "/bin/vdtrain", "train", "gpus=2"]
    assert elastic.words_of("data latents", ["gpus=3"]) == ["-m", "vdtrain", "data", "latents", "gpus=3"]


def test_latents_are_shared_by_processes_of_one_command(tmp_path: Path, data: Path) -> None:
    words = [*TINY[:-1], f"data.manifest={data}", "data.latent_cache.resolutions=[32]"]
    run = Started(tmp_path, ["data", "latents", *words, f"data.latent_cache.folder={tmp_path / 'made'}", "gpus=2"])
    assert run.end() == 0, run.said
    assert "20 latents of 2 shards" in run.said
    assert "this process encoded 10 images" in run.said
    assert json.loads((tmp_path / "made/32/latents.json").read_text())
