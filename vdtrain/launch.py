"""Which of a run's processes this one is, from the variables of whoever started it. Needs no PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from vdtrain.command_line import CommandLine
from vdtrain.compose import ConfigError, Schema, run_verb
from vdtrain.overrides import Override

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Below the range from which Linux hands out ports to outgoing connections.
FIRST_PORT, PORTS = 12_000, 20_000
# Slurm numbers the batch script and an interactive shell of `salloc` from here on, beside srun's own steps from 0.
FIRST_STEP_WITHOUT_SRUN = 0xFFFF_FFF0


def launch_variables() -> dict[str, str]:
    """The five variables of torchrun, whoever started this process; without an address for a single process.

    Raises:
        ConfigError: if the launcher's variables are incomplete.
    """
    environment = os.environ
    if "RANK" in environment or "WORLD_SIZE" in environment:
        missing = [name for name in TORCHRUN_VARIABLES if name not in environment]
        if missing:
            raise ConfigError(f"launcher: {', '.join(missing)} not set beside RANK or WORLD_SIZE; use torchrun or srun")
        return {name: environment[name] for name in TORCHRUN_VARIABLES}
    # Slurm sets SLURM_PROCID in a batch script too, where there is one process whatever SLURM_NTASKS says.
    step = environment.get("SLURM_STEP_ID")
    if step is not None and int(step) < FIRST_STEP_WITHOUT_SRUN and "SLURM_PROCID" in environment:
        return _slurm_launch()
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def run_verb_on_ranks(
    usage: str,
    config_name: str,
    schema: type[Schema],
    action: Callable[[Schema, DictConfig, dict[str, str]], int],
    argv: Sequence[str],
    plain: Callable[[CommandLine], list[Override]] | None = None,
) -> int:
    """`vdtrain.compose.run_verb` in one of several processes, of which rank 0 alone names a mistake.

    `action` gets the launcher's variables too; where they are incomplete, that is such a mistake, of every process.
    """
    try:
        launch = launch_variables()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def on_rank(config: Schema, document: DictConfig) -> int:
        return action(config, document, launch)

    return run_verb(usage, config_name, schema, on_rank, argv, launch["RANK"] == "0", plain)


def _slurm_launch() -> dict[str, str]:
    environment = os.environ
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    launch = {"RANK": environment["SLURM_PROCID"], "LOCAL_RANK": environment["SLURM_LOCALID"], "WORLD_SIZE": tasks}
    if tasks != "1":
        # Rank 0 is on the first node of its step, which need not be the job's.
        nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        offset = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
        launch["MASTER_ADDR"] = environment.get("MASTER_ADDR") or _first_node(nodes)
        launch["MASTER_PORT"] = environment.get("MASTER_PORT") or str(FIRST_PORT + offset % PORTS)
    return launch


def _first_node(node_list: str) -> str:
    """First host of a Slurm node list such as "gpu[07-10,12],login1"."""
    if not set(node_list) & set("[],"):
        return node_list
    try:
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"launcher: scontrol cannot read nodes {node_list!r} ({error}); set MASTER_ADDR") from error
    return answer.stdout.split()[0]
