"""Which tests run in the same process of pytest-xdist, and in which order.

A module's tests stay together, for they share what its fixtures make; so do those of modules that share a fixture of
the session. What takes longest begins first.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Fixtures of the session that take seconds, as a module asks for them.
SHARED = ("cluster: Cluster", "tiny_runs: TinyRuns", "world: World")
# What takes longest, in order.
FIRST = (
    SHARED[0],
    "tests/documents/test_commands.py",
    "tests/drill/test_drill.py",
    "tests/training/test_resume.py",
    "tests/training/test_wandb.py",
    "tests/data_pipeline/test_download.py",
    "tests/training/test_trainer.py",
    "tests/training/test_watchdog.py",
    SHARED[1],
    SHARED[2],
)


@functools.cache
def group(file: str) -> str:
    """The fixture that a test module shares with others, or else the module itself."""
    text = (ROOT / file).read_text()
    return next((fixture for fixture in SHARED if re.search(rf"\b{fixture}\b", text)), file)


def group_of(nodeid: str) -> str:
    return group(nodeid.partition("::")[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first; groups stay in one piece."""
    groups = dict.fromkeys([*FIRST, *(group_of(item.nodeid) for item in items)])
    places = {name: place for place, name in enumerate(groups)}
    items.sort(key=lambda item: places[group_of(item.nodeid)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole groups."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)
