"""This process's rank, from the launcher's environment variables, and commands that run on ranks. Needs no PyTorch."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.command_line import CommandLine
from vdtrain.config.overrides import Override
from vdtrain.config.schema import ProcessesConfig
from vdtrain.errors import ConfigError
from vdtrain.redaction import redacted_output
from vdtrain.run import elastic
from vdtrain.run.processes import FOREIGN_LAUNCHERS, in_step
from vdtrain.run.signals import ending

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Below Linux's range for outgoing connections.
FIRST_PORT, PORTS = 12_000, 20_000
# Numeric variables of torchrun and Slurm, with their minimum.
NUMBERS = {
    "RANK": 0,
    "LOCAL_RANK": 0,
    "WORLD_SIZE": 1,
    "MASTER_PORT": 0,
    "SLURM_JOB_ID": 0,
    "SLURM_STEP_ID": 0,
    "SLURM_PROCID": 0,
    "SLURM_LOCALID": 0,
    "SLURM_NTASKS": 1,
    "SLURM_STEP_NUM_TASKS": 1,
    "SLURM_RESTART_COUNT": 0,
}
# The settings of a command's own processes.
PROCESSES = tuple(each.name for each in fields(ProcessesConfig))
# How long a process tries to reach process 0, whose first imports take a while: there, or on this machine, where it is
# seen to live. And how often.
TELL_SECONDS, TELL_HERE_SECONDS, TELL_TURN_SECONDS = 20.0, 300.0, 0.25
OWN_NUMBERS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID")
# The first entry of a Slurm node list, and what its brackets begin with: rack[1-2]gpu[07-10,12] begins at rack1gpu07.
FIRST_NODES = re.compile(r"(?:[^,\[\]]|\[[^\[\]]+\])+(?=,|$)")
FIRST_OF_RANGES = re.compile(r"\[(\w+)[^\]]*\]")


Schema = TypeVar("Schema", bound=ProcessesConfig)


class OwnNumberError(ConfigError):
    """A variable of this process alone is wrong; the other processes do not see it."""


def launch_variables() -> dict[str, str]:
    """The five variables of torchrun, under any launcher; a single process has no address.

    Raises:
        ConfigError: the launcher's variables are incomplete or not numbers, or the launcher is not supported.
    """
    environment = os.environ
    for name in NUMBERS:
        number(name)
    if "RANK" in environment or "WORLD_SIZE" in environment:
        missing = [name for name in TORCHRUN_VARIABLES if name not in environment]
        if missing:
            raise ConfigError(f"launcher: {', '.join(missing)} not set beside RANK or WORLD_SIZE; use torchrun or srun")
        rank, processes = number("RANK"), number("WORLD_SIZE")
        if rank >= processes:
            raise OwnNumberError(f"launcher: RANK={rank}: {processes} processes count from 0; use torchrun or srun")
        return {name: environment[name] for name in TORCHRUN_VARIABLES}
    # A batch script is one process whatever SLURM_NTASKS is.
    by_srun = in_step(environment)
    for name in FOREIGN_LAUNCHERS:
        # srun may set PMI_SIZE too; mpirun passes on what srun set for its helper on each node.
        known = _slurm_tasks() if by_srun and name == "PMI_SIZE" else "1"
        if environment.get(name, known) != known:
            raise ConfigError(
                f"launcher: {name}={environment[name]}: mpirun started these processes, and each would work alone; "
                "use torchrun or srun"
            )
    if by_srun:
        return _slurm_launch()
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def number(name: str) -> int:
    """A numeric variable of a launcher; its minimum if it is not set.

    Raises:
        ConfigError: it is not a number, or below its minimum.
    """
    value, least = os.environ.get(name, ""), NUMBERS[name]
    if not value:
        return least
    if not (value.isascii() and value.isdecimal()) or int(value) < least:
        launcher = "srun sets it in a job of Slurm" if name.startswith("SLURM_") else "torchrun and srun set it"
        kind = OwnNumberError if name in OWN_NUMBERS else ConfigError
        raise kind(f"launcher: {name}={value}: not a number from {least} on; {launcher}, or `unset {name}`")
    return int(value)


@redacted_output()
def run_command_on_ranks(
    usage: str,
    config_name: str,
    schema: type[Schema],
    action: Callable[[Schema, DictConfig, dict[str, str]], int],
    argv: Sequence[str],
    plain: Callable[[CommandLine], list[Override]] | None = None,
    parts: Sequence[str] = (),
    prepare: Callable[[Schema, int], Schema] = lambda config, processes: config,
    command: str | None = None,
) -> int:
    """`vdtrain.config.command.run_command` in one of several processes; only rank 0 prints a mistake.

    `action` also receives the launcher's variables. Unusable variables are a mistake too. With `gpus=N` this process
    starts the others; see `vdtrain.run.elastic`.

    Args:
        prepare: checks and completes the configuration for a number of processes, before anything is started.
        command: the words after `vdtrain`; by default `config_name`.
    """
    try:
        launch = launch_variables()
    except ConfigError as error:
        names = ("RANK", *FOREIGN_LAUNCHERS.values(), "SLURM_PROCID")
        first = next((os.environ[name] for name in names if name in os.environ), "0") == "0"
        if first or isinstance(error, OwnNumberError):
            print(f"error: {error}", file=sys.stderr)
        return 2

    mistakes: list[str] = []

    def on_rank(config: Schema, raw_config: DictConfig) -> int:
        try:
            return work(config, raw_config)
        except ConfigError as error:
            mistakes.append(str(error))
            raise

    def work(config: Schema, raw_config: DictConfig) -> int:
        device = config.hardware.device if hasattr(config, "hardware") else getattr(config, "device", "")
        if elastic.starts_ranks(config):
            prepare(config, elastic.world_size(config))
            return elastic.start(config, elastic.words_of(command or config_name, argv), device)
        config = prepare(config, int(launch["WORLD_SIZE"]))
        if line := elastic.unused_gpus(config, device):
            print(f"warning: {line}", file=sys.stderr, flush=True)
        try:
            return action(config, raw_config, launch)
        except RuntimeError as error:
            # It has imported PyTorch already if it exchanges anything.
            from vdtrain.run.company import LOST_STATUS
            from vdtrain.run.connections import connection_problem

            problem = connection_problem(error)
            if problem is None:
                raise
            ending.check()
            if problem:
                print(f"error: process {launch['RANK']}: {problem}", file=sys.stderr, flush=True)
            # A regular end would wait for the other processes.
            sys.stdout.flush()
            os._exit(LOST_STATUS)

    status = run_command(usage, config_name, schema, on_rank, argv, launch["RANK"] == "0", plain, parts)
    if status == ConfigError.status and launch["RANK"] != "0":
        _tell_mistake(launch, *mistakes)
    return status


def _tell_mistake(launch: Mapping[str, str], text: str = "a mistake in its settings; try the command there") -> None:
    """End the wait of the other processes for this one, which may be the only one with a mistake, as of a node's files.

    If all have the same mistake, there is nobody to tell: process 0 says it, and has no store.
    """
    distributed: Any = sys.modules.get("vdtrain.run.distributed")
    if distributed is not None and distributed.has_joined():
        return
    place = launch["MASTER_ADDR"], int(launch["MASTER_PORT"])
    own = socket.gethostname()
    here = place[0] in ("127.0.0.1", "localhost", "::1", own, own.partition(".")[0])
    end = time.monotonic() + (TELL_HERE_SECONDS if here else TELL_SECONDS)
    while not _answers(place):
        if time.monotonic() >= end or (here and not _first_is_here(launch)):
            return
        time.sleep(TELL_TURN_SECONDS)
    os.environ.update(launch)
    from vdtrain.run.company import tell_mistake

    tell_mistake(int(launch["RANK"]), int(launch["WORLD_SIZE"]), text, TELL_SECONDS)


def _answers(place: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(place, timeout=TELL_SECONDS):
            return True
    except OSError:
        return False


def _first_is_here(launch: Mapping[str, str]) -> bool:
    """Whether process 0 of this run is on this machine."""
    marks = {"RANK": "0", "MASTER_PORT": launch["MASTER_PORT"]}
    if "RANK" not in os.environ:
        marks = {"SLURM_PROCID": "0", **{name: os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")}}
    wanted = {f"{name}={value}".encode() for name, value in marks.items()}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                return True
    return False


def _slurm_launch() -> dict[str, str]:
    environment = os.environ
    if not environment.get("SLURM_LOCALID"):
        raise ConfigError("launcher: SLURM_LOCALID is not set beside SLURM_PROCID; let srun start the processes")
    launch = {"RANK": str(number("SLURM_PROCID")), "LOCAL_RANK": environment["SLURM_LOCALID"]}
    launch["WORLD_SIZE"] = _slurm_tasks()
    if int(launch["RANK"]) >= int(launch["WORLD_SIZE"]):
        raise OwnNumberError(
            f"launcher: SLURM_PROCID={launch['RANK']}: SLURM_STEP_NUM_TASKS or SLURM_NTASKS tells of "
            f"{launch['WORLD_SIZE']} processes, and they count from 0; let srun start the processes"
        )
    if launch["WORLD_SIZE"] != "1":
        # Rank 0 is on the step's first node, which may differ from the job's.
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        offset = number("SLURM_JOB_ID") + number("SLURM_STEP_ID")
        launch["MASTER_ADDR"] = environment.get("MASTER_ADDR") or _first_node(nodes)
        launch["MASTER_PORT"] = environment.get("MASTER_PORT") or str(FIRST_PORT + offset % PORTS)
    return launch


def _slurm_tasks() -> str:
    return str(number("SLURM_STEP_NUM_TASKS" if os.environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"))


def _first_node(node_list: str) -> str:
    """First host of a Slurm node list such as "gpu[07-10,12],login1". A container often lacks `scontrol`, which tells.

    Raises:
        ConfigError: it is no such list.
    """
    found = FIRST_NODES.match(node_list)
    if found is None:
        raise ConfigError(f"launcher: SLURM_JOB_NODELIST={node_list}: not a list of nodes; set MASTER_ADDR")
    return FIRST_OF_RANGES.sub(r"\1", found[0])
