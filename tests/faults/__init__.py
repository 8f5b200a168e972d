"""Disks that fail, crawl or hang: file operations of real processes, by a preloaded library (`shim.c`).

variables(folder, "read /checkpoints/step-000000004 errno=5 times=2 rank=1", "write /checkpoints/ rate=100000")
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("shim.c")
VARIABLE = "VDTRAIN_FAULTS"


def variables(folder: Path, *rules: str) -> dict[str, str]:
    """The environment of a process that the rules befall; see `shim.c`. Skips the test where there is no C compiler.

    Args:
        folder: for the compiled library.
    """
    library = compiled(folder)
    if library is None:
        pytest.skip("no C compiler, so disks that fail are not tried here")
    return {"LD_PRELOAD": str(library), VARIABLE: ";".join(rules)}


def compiled(folder: Path) -> Path | None:
    """The library, made in a folder where it is not there yet; None where there is no C compiler."""
    library = folder / "faults.so"
    if not library.exists():
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            return None
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, SOURCE, "-ldl"], check=True)
    return library
