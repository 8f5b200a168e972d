"""Runs functions of a test module on several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def run_on_ranks() -> Callable[..., list[dict[str, Any]]]:
    """run_on_ranks(function, ranks, folder): what `function(folder, report)` reported on each rank.

    The function belongs to a test module and is looked up there by name. Starting costs seconds, so that one run should
    serve many tests.
    """
    return _run_on_ranks


def _run_on_ranks(
    function: Callable[..., None], ranks: int, folder: Path, timeout: float = 600.0, must_end_well: bool = True
) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    module = Path(function.__code__.co_filename)
    command = [sys.executable, str(HERE / "ranks.py"), str(module), function.__name__, str(folder)]
    logs = [folder / f"{function.__name__}-{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        with log.open("w") as output:
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail(f"{function.__name__} on {ranks} ranks took longer than {timeout} s\n{_texts(logs)}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    answers = [json.loads(log.with_suffix(".json").read_text()) for log in logs if log.with_suffix(".json").exists()]
    if len(answers) < ranks or any("failure" in answer for answer in answers) or (must_end_well and any(codes)):
        pytest.fail(f"{function.__name__} on {ranks} ranks ended with {codes}\n{_texts(logs)}")
    return [answer["results"] for answer in answers]


def _texts(logs: list[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)
