"""Runs functions of a test module on several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.programs import run_ranks


@pytest.fixture(scope="session")
def run_on_ranks() -> Callable[..., list[dict[str, Any]]]:
    """run_on_ranks(function, ranks, folder): what `function(folder, report)` reported on each rank.

    The function belongs to a test module and is looked up there by name.
    """
    return _run_on_ranks


def _run_on_ranks(
    function: Callable[..., None], ranks: int, folder: Path, timeout: float = 600.0, must_end_well: bool = True
) -> list[dict[str, Any]]:
    command = ["-m", "tests.training.ranks", function.__module__, function.__name__, str(folder)]
    logs = [folder / f"{function.__name__}-{rank}.log" for rank in range(ranks)]
    ending = run_ranks([command] * ranks, logs, timeout, {"PYTHONFAULTHANDLER": "1"})
    answers = [json.loads(log.with_suffix(".json").read_text()) for log in logs if log.with_suffix(".json").exists()]
    failed = len(answers) < ranks or any("failure" in answer for answer in answers)
    if failed or (must_end_well and any(ending.statuses)):
        pytest.fail(f"{function.__name__} on {ranks} ranks {ending}")
    return [answer["results"] for answer in answers]
