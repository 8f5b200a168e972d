"""The processes of this machine: the launcher of this rank, its children, and who is alive. Imports little.

The command itself, torchrun, Slurm's slurmstepd or mpirun launches a rank. A rank has variables that its launcher sets
in every rank and does not have itself. So the launcher is the nearest ancestor without them, whatever shells and
wrappers stand between. A process that a person started has none of these variables, and no launcher: it may outlive its
shell. The same holds for a rank with a `nohup` of its own, and for one that left its launcher and became a child of
init.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

# Launchers that are not supported: their variables for the number of processes and for the rank.
FOREIGN_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",  # Open MPI and its derivatives
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",  # MVAPICH
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",  # LSF's jsrun
    "PMI_SIZE": "PMI_RANK",  # MPICH, Intel MPI, Cray
}
# Slurm gives batch scripts and `salloc` shells step ids from here on; srun's steps count from 0.
FIRST_STEP_WITHOUT_SRUN = 0xFFFF_FFF0
# TORCHELASTIC_RUN_ID of processes that a command has started itself; see `vdtrain.run.elastic`.
OWN_RUN = "vdtrain-starts-itself"


def in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process; Slurm sets SLURM_PROCID in a batch script too."""
    step = environment.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environment and step.isdecimal() and int(step) < FIRST_STEP_WITHOUT_SRUN


def started_by_command(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a command of ours has started this process as one of several."""
    return environment.get("TORCHELASTIC_RUN_ID") == OWN_RUN


def launchers(environment: Mapping[str, str] = os.environ) -> dict[int, str]:
    """A pidfd of each launcher of this process, with its name and number. It is readable when the launcher has ended.

    srun may start torchrun, so that a rank has two. One that has ended before is not found.
    """
    marks = [name for name in ("TORCHELASTIC_RUN_ID", *FOREIGN_LAUNCHERS.values()) if name in environment]
    found: dict[int, str] = {}
    for mark in [*marks, *["SLURM_PROCID"] * in_step(environment)]:
        pid = _launcher(mark)
        if pid is None or _has_nohup(pid):
            continue
        with suppress(OSError):
            name, descriptor = _name(pid), os.pidfd_open(pid)
            if _launcher(mark) == pid:
                found[descriptor] = f"{name} (process {pid})"
            else:
                os.close(descriptor)
    return found


def _launcher(mark: str) -> int | None:
    """The nearest ancestor whose first variables lack `mark`; None if that is init or unknown."""
    pid = os.getppid()
    while pid > 1:
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except PermissionError:
            return pid  # slurmstepd is root's
        except OSError:
            return None
        if not any(each.startswith(f"{mark}=".encode()) for each in variables):
            return pid
        pid = _parent(pid)
    return None


def children() -> list[int]:
    """The processes that this one has started and that have not ended."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and _parent(int(name)) == os.getpid()]


def stat_of(pid: int) -> list[str]:
    """What the system tells of a process of this machine: its state, its parent and further fields of proc(5).

    Raises:
        OSError: it has ended, or the system does not tell.
    """
    # The program's name before them, in parentheses, may hold any character.
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def machine() -> list[str]:
    """Identity of a process-number space: a host since its boot, or a container on it."""
    parts = [socket.gethostname()]
    for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(name) if os.path.islink(name) else Path(name).read_text().strip())
        except OSError:
            parts.append("")
    return parts


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in kernel ticks. This tells a reused process number from the old one.

    None if there is no such process, "" if the system does not tell.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    try:
        state, *rest = stat_of(pid)
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else ""
    except OSError:
        return ""
    return None if state in "ZX" else rest[18]


def _parent(pid: int) -> int:
    try:
        return int(stat_of(pid)[1])
    except (OSError, IndexError):
        return 0


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    if any("torchrun" in word or word == "torch.distributed.run" for word in words):
        return "torchrun"
    if started_by_command():
        return "vdtrain"
    return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()


def _has_nohup(launcher: int) -> bool:
    """Whether SIGHUP is ignored here and not by the launcher: somebody wants this process to live on."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not _ignores_hangup(launcher)


def _ignores_hangup(pid: int) -> bool:
    with suppress(OSError, IndexError, ValueError):
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        return bool(int(status.partition("SigIgn:")[2].split()[0], 16) & 1 << (signal.SIGHUP - 1))
    return False
