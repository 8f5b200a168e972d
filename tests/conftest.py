"""Settings of every test: one thread, so that two cores are not fought over, and a Ctrl-C that arrives."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import pytest
import torch

if TYPE_CHECKING:
    from tests.tiny_runs import TinyRuns

torch.set_num_threads(1)
# A script's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    """Runs to look at; a test that changes one copies it first."""
    from tests.tiny_runs import make_tiny_runs

    return make_tiny_runs(tmp_path_factory.mktemp("tiny"))
