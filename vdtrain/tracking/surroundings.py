"""The machine, the versions and the commit that a result belongs to."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("vdtrain", "torch", "deepspeed", "diffusers", "transformers", "open_clip_torch", "numpy")
# Of the batch job: variables without SLURM_.
SLURM = (
    *("CLUSTER_NAME", "JOB_ID", "JOB_NAME", "JOB_PARTITION", "JOB_NODELIST", "JOB_NUM_NODES", "NTASKS"),
    *("ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT"),
)


def environment(hosts: Sequence[str], device: str) -> dict[str, Any]:
    """What a run records beside its configuration: commit, versions, machines, and the Slurm job if there is one."""
    job = {name.lower(): os.environ[f"SLURM_{name}"] for name in SLURM if f"SLURM_{name}" in os.environ}
    machines = {"hosts": list(dict.fromkeys(hosts)), "processes": len(hosts), "device": device}
    return {"commit": commit(), "versions": versions(*PACKAGES), **machines} | ({"slurm": job} if job else {})


def processor() -> str:
    """The processor's name, or its architecture where the system does not tell the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(*packages: str) -> dict[str, str]:
    """Of Python, and of those packages that are installed: this one may run from its checkout alone."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str | None:
    """The commit of this code's checkout, with "+" if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
