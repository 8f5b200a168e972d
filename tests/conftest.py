"""Settings of every test: one thread, so that two cores are not fought over."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import pytest
import torch

if TYPE_CHECKING:
    from tests.tiny_runs import TinyRuns

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    """Runs to look at; a test that changes one copies it first."""
    from tests.tiny_runs import make_tiny_runs

    return make_tiny_runs(tmp_path_factory.mktemp("tiny"))
