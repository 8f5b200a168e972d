"""A command that starts its processes itself, `gpus=N`, by PyTorch's elastic launcher. Imports PyTorch late."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from vdtrain.config.schema import ProcessesConfig
from vdtrain.errors import ConfigError, one_line
from vdtrain.run.processes import OWN_RUN, children, in_step, started_by_command
from vdtrain.run.signals import HELD, ending

ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):(\d{1,5})")
MOST_PORT = 65_535
# So long a node waits for the others.
MEET_SECONDS = 600
FAILED = 1
# A GPU is idle if no more of its memory is in use; the driver takes some.
IDLE_SHARE = 0.05
NVIDIA_SMI_SECONDS = 20.0


class MeetingError(ConfigError):
    """The nodes of a run did not meet."""

    status = FAILED


def world_size(config: ProcessesConfig) -> int:
    """Number of processes of a command on all its nodes, if it starts them itself.

    Raises:
        ConfigError: the settings do not fit each other.
    """
    gpus, nodes, rank, place = config.gpus, config.nnodes, config.node_rank, config.rendezvous
    if nodes > 1 and gpus is None:
        raise ConfigError(f"nnodes={nodes}: add gpus=N, the number of processes of each node")
    if nodes > 1 and place is None:
        raise ConfigError(f"nnodes={nodes}: add rendezvous=HOST:PORT, one of the nodes and a port that is free there")
    if nodes == 1 and place is not None:
        raise ConfigError(f"rendezvous={place}: one node meets no other; add nnodes=N, or take it out")
    if place is not None and ((found := ENDPOINT.fullmatch(place)) is None or not 0 < int(found[2]) <= MOST_PORT):
        raise ConfigError(f"rendezvous={place}: not HOST:PORT, such as node1:29500")
    if rank is not None and rank >= nodes:
        raise ConfigError(f"node_rank={rank}: nnodes={nodes}, and they count from 0")
    return (gpus or 1) * nodes


def starts_ranks(config: ProcessesConfig) -> bool:
    """Whether this process has to start others, which do the command's work, and does none itself.

    Raises:
        ConfigError: another launcher has started this process, or has to.
    """
    if started_by_command():
        return False
    given = [
        (each.name, value) for each in fields(ProcessesConfig) if (value := getattr(config, each.name)) != each.default
    ]
    launcher = "torchrun" if "RANK" in os.environ else "Slurm" if "SLURM_JOB_ID" in os.environ else ""
    if given and (launcher or in_step(os.environ)):
        name, value = given[0]
        instead = "it has started the processes" if "RANK" in os.environ else "srun starts the processes of a job"
        raise ConfigError(f"{name}={value}: this runs under {launcher or 'Slurm'}, and {instead}; take {name} out")
    return world_size(config) > 1


def start(config: ProcessesConfig, words: Sequence[str], device: str) -> int:
    """Start this node's processes, pass signals on to them, and return the exit status of all of them.

    Args:
        words: after the interpreter's name; what each of them runs.

    Raises:
        ConfigError: the node has too few GPUs.
    """
    ending.passes_on = _pass_on
    for number in HELD:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    if ending.received:
        # It came before there was anything to pass it on to.
        ending.leave(ending.received)
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    assert config.gpus is not None
    if device == "cuda" and (found := torch.cuda.device_count()) < config.gpus:
        raise ConfigError(
            f"gpus={config.gpus}: PyTorch finds {found} GPU{'s' * (found != 1)} on this node; take as many, or repair "
            "the driver"
        )
    # As many threads as there are processors for each process.
    processors = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors // config.gpus)))
    # PyTorch's launcher would repeat at length what a process has said in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.CRITICAL)
    # Processes that start meanwhile receive HELD signals when they can act on them, see `signals.begin`.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        with tempfile.TemporaryDirectory(prefix="vdtrain-") as logs:
            _launch(config, words, logs)
    except ChildFailedError as error:
        return _status(error.failures)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        logging.disable(logging.NOTSET)
    return 0


def _launch(config: ProcessesConfig, words: Sequence[str], logs: str) -> None:
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    meeting: dict[str, Any] = {"timeout": MEET_SECONDS, "join_timeout": MEET_SECONDS, "read_timeout": MEET_SECONDS}
    if config.node_rank is not None:
        meeting["rank"] = config.node_rank
    launch = LaunchConfig(
        min_nodes=config.nnodes,
        max_nodes=config.nnodes,
        nproc_per_node=config.gpus or 1,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        run_id=OWN_RUN,
        rdzv_backend="c10d" if config.node_rank is None or config.nnodes == 1 else "static",
        rdzv_endpoint=config.rendezvous or "localhost:0",
        rdzv_configs=meeting,
        # The watchdog and the checkpoints are ours; a person or a scheduler starts a run again.
        max_restarts=0,
        # They are passed on, and the processes end by themselves.
        signals_to_handle="",
    )
    try:
        # It would fill in the $ of a setting.
        elastic_launch(launch, sys.executable)(*(word.replace("$", "$$") for word in words))
    except (RendezvousError, DistError) as error:
        cause = one_line(error.__cause__ or error)
        taken = "address already in use" in cause.lower() or "EADDRINUSE" in cause
        reason = (
            "another program listens there; give another port"
            if taken
            else f"the {config.nnodes} nodes did not meet there within {MEET_SECONDS} s; run the command on each of "
            "them, with one HOST:PORT that all of them reach"
        )
        raise MeetingError(f"rendezvous={config.rendezvous}: {reason}") from error


def _status(failures: Mapping[int, Any]) -> int:
    """The exit status of the processes, by the first that failed; a line on what it could not say itself."""
    first = min(failure.timestamp for failure in failures.values())
    early = {rank: failure.exitcode for rank, failure in failures.items() if failure.timestamp <= first + 1}
    for rank, status in early.items():
        if status < 0 and -status not in HELD:
            number = signal.Signals(-status)
            memory = ", as by the system when memory runs out (see `dmesg`)" if number == signal.SIGKILL else ""
            print(
                f"error: process {rank} was ended by {number.name}{memory}; the same command continues",
                file=sys.stderr,
                flush=True,
            )
            return FAILED
    status = next(iter(early.values()))
    return int(128 - status if status < 0 else status)


def _pass_on(number: int) -> None:
    """Send a signal to the processes; before there are any, it ends this one. Called by the thread of `signals`."""
    ranks = children()
    if not ranks:
        ending.leave(number)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, number)


def words_of(command: str, argv: Sequence[str]) -> list[str]:
    """What started this process, after the interpreter's name: the flags and program of the user's own command."""
    typed = sys.orig_argv[1:]
    if argv and typed[-len(argv) :] == list(argv):
        return typed
    return ["-m", "vdtrain", *command.split(), *argv]


def unused_gpus(config: ProcessesConfig, device: str) -> str | None:
    """A line about the idle GPUs of a node on which one process is about to start, by itself; None if all is well."""
    if config.gpus is not None or device == "cpu" or "RANK" in os.environ or in_step(os.environ):
        return None
    idle = idle_gpus()
    if idle < 2:
        return None
    instead = "`srun` starts a process on each" if "SLURM_JOB_ID" in os.environ else f"gpus={idle} takes all of them"
    return f"{idle} GPUs of this machine are idle, and one process uses one of them; {instead}, gpus=1 takes one"


def idle_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Number of GPUs that this process may use and nobody does; 0 if unknown. Takes no memory on them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    asked = [program, "--query-gpu=index,uuid,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_SECONDS).stdout
        rows = [[each.strip() for each in line.split(",")] for line in answer.splitlines()]
        idle = [(index, uuid) for index, uuid, used, total in rows if float(used) <= IDLE_SHARE * float(total)]
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(idle)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return sum(any(name == index or uuid.startswith(name) for name in names) for index, uuid in idle)
