"""The cluster that all tests here share, and a folder from which a user would submit."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clones import make_clone
from tests.slurm.cluster import Cluster, reason_to_skip

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one GPU each, in partitions low, whose jobs are preempted by signal, and high."""
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        number = _own_number(stack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp")))
        folder.chmod(0o755)
        cluster = Cluster(folder, number)
        # Some dependency installs a package `tests` of its own.
        cluster.environment["PYTHONPATH"] = str(ROOT)
        stack.callback(cluster.stop)
        cluster.start()
        yield cluster


def _own_number(stack: contextlib.ExitStack) -> int:
    """A number that no other session on this machine holds."""
    for number in range(1, 250):
        lock = os.open(f"/tmp/vdtrain-slurm-{number}.lock", os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, lock)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number
    pytest.skip("249 test clusters are running on this machine")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a fresh clone, so that jobs leave nothing in this one; its programs are forks."""
    return make_clone(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `checkout`, with the interpreter itself."""
    folder = make_clone(tmp_path_factory.mktemp("installed"), forks=False)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder
