"""Folders that look like fresh clones, so that scripts of the repository leave nothing in this one."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.programs import SOCKET, install
from tests.programs import folder as programs

ROOT = Path(__file__).parents[1]
FOLDERS = ("slurm", "vdtrain", "data_pipeline", "miniature", "conf", "examples", "tests")


def make_clone(folder: Path, forks: bool = True) -> Path:
    """Fill an empty folder; its programs are forks, or there are none."""
    for name in FOLDERS:
        (folder / name).symlink_to(ROOT / name)
    for kept in ROOT.glob("logs/*/.gitignore"):
        (folder / kept.parent.relative_to(ROOT)).mkdir(parents=True)
        shutil.copy(kept, folder / kept.relative_to(ROOT))
    if forks:
        install(folder / ".venv" / "bin", programs() / SOCKET)
    return folder
