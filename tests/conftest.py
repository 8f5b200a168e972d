"""Settings of every test: one thread, so that two cores are not fought over, and a Ctrl-C that arrives.

The summary names what was not proven.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
# Each of some hundred processes would otherwise compile PyTorch and its like anew, which is most of a start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import torch

from tests import programs

if TYPE_CHECKING:
    from tests.tiny_runs import TinyRuns
    from tests.world import World

pytest_plugins = ["tests.order"]
torch.set_num_threads(1)
sys.dont_write_bytecode = False
# A script's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Start the process that forks for the tests: one for all workers of pytest-xdist."""
    if not hasattr(config, "workerinput"):
        stack = contextlib.ExitStack()
        config.add_cleanup(stack.close)
        stack.enter_context(programs.session())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """End the summary with a line for each reason to skip tests: where they are, and how many."""
    yield
    skipped = defaultdict(list)
    for report in terminalreporter.getreports("skipped"):
        # A skip is reported as file, line and "Skipped: REASON".
        skipped[report.longrepr[2].removeprefix("Skipped: ")].append(report.nodeid.partition("::")[0])
    for reason, files in sorted(skipped.items()):
        tests = f"{len(files)} test{'s' * (len(files) > 1)}"
        terminalreporter.write_line(f"not proven here: {os.path.commonpath(files)} ({reason}) - {tests}")


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    """Runs to look at; a test that changes one copies it first."""
    from tests.tiny_runs import make_tiny_runs

    return make_tiny_runs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every `world` is a copy of."""
    from tests.world import make_origin

    return make_origin(tmp_path_factory.mktemp("origin"))


@pytest.fixture
def world(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A folder of one's own to type commands in; what was mounted or protected there is let go."""
    from tests.world import IDS, World

    for name in [name for name in os.environ if name.startswith("SLURM_") or name in IDS]:
        monkeypatch.delenv(name)
    shutil.copytree(origin, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    made = World(tmp_path / "w")
    yield made
    for folder in made.protected:
        subprocess.run(["chattr", "-i", folder], capture_output=True, check=False)
    for folder in reversed(made.mounts):
        subprocess.run(["umount", folder], check=True)
