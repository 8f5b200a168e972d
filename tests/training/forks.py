"""One process per rank that forks itself for every case, so that imports are paid once: `python forks.py FOLDER RANK`.

FOLDER/cases.json lists what `run_cases` was asked for. Each fork leaves FOLDER/NUMBER-RANK.log and its exit status in
FOLDER/NUMBER-RANK.exit.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True)
class Case:
    """One start of `vdtrain train` on some ranks, with the trouble that befalls it (see trouble.py), if any."""

    ranks: int
    arguments: list[str]
    trouble: dict[str, str | int] | None = None


@dataclass(frozen=True)
class Ending:
    """How a case ended: exit status (negative for a signal) and output, by rank."""

    statuses: list[int]
    logs: list[str]


def run_cases(folder: Path, cases: list[Case], before: Callable[[int], None] | None = None) -> list[Ending]:
    """Run cases one after another; what they have in common is on disk.

    Args:
        before: called with the number of a case when all before it have ended, and it has not begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waits = before is not None
    described = [{**asdict(case), "port": _free_port(), "waits": waits} for case in cases]
    (folder / "cases.json").write_text(json.dumps(described))
    ranks = max(case.ranks for case in cases)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), str(folder)]
    servers = [
        subprocess.Popen([*command, str(rank)], env=environment, start_new_session=True) for rank in range(ranks)
    ]
    try:
        for number, case in enumerate(cases if before is not None else ()):
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while not all((folder / f"{number}-{rank}.ready").exists() for rank in range(case.ranks)):
                assert all(server.poll() in (None, 0) for server in servers)
                assert time.monotonic() < deadline
                time.sleep(0.05)
            before(number)
            (folder / f"{number}.go").touch()
        for server in servers:
            assert server.wait(TIMEOUT_SECONDS) == 0
    finally:
        for server in servers:
            if server.poll() is None:
                os.killpg(server.pid, 9)
                server.wait()
    return [
        Ending(
            [int((folder / f"{number}-{rank}.exit").read_text()) for rank in range(case.ranks)],
            [(folder / f"{number}-{rank}.log").read_text() for rank in range(case.ranks)],
        )
        for number, case in enumerate(cases)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(folder: Path, rank: int) -> None:
    import torch

    from vdtrain.engine.deepspeed import import_deepspeed

    torch.set_num_threads(1)
    import_deepspeed("cpu")
    import vdtrain.run.session  # noqa: F401
    from vdtrain.config.compose import compose, to_object
    from vdtrain.config.schema import TrainConfig
    from vdtrain.models.frozen import build_frozen

    # For what they import when they are first used.
    importlib.import_module("pandas")
    build_frozen(to_object(compose("train", ["model=tiny", "data=shapes"]), TrainConfig).model)
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        if rank >= case["ranks"]:
            continue
        _meet(folder, number, rank, case["ranks"], case["waits"])
        child = os.fork()
        if child == 0:
            _be_rank(folder / f"{number}-{rank}.log", rank, case)
        _, status = os.waitpid(child, 0)
        (folder / f"{number}-{rank}.exit").write_text(str(os.waitstatus_to_exitcode(status)))


def _meet(folder: Path, number: int, rank: int, ranks: int, waits: bool) -> None:
    """Wait for the case's other ranks, some of which may still be at an earlier case, and for what comes before it."""
    (folder / f"{number}-{rank}.ready").touch()
    awaited = [folder / f"{number}-{other}.ready" for other in range(ranks)] + [folder / f"{number}.go"] * waits
    while not all(path.exists() for path in awaited):
        time.sleep(0.05)


def _be_rank(log: Path, rank: int, case: dict[str, object]) -> None:
    status = 70
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["ranks"]))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(case["port"]))
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        import trouble

        from vdtrain.commands.train import main

        if case["trouble"]:
            trouble.prepare(rank, case["trouble"])
        status = main(case["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
