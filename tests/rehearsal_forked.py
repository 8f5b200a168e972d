"""benchmarks/rehearsal.py with commands that are forks of this process, so that imports are paid once.

python tests/rehearsal_forked.py --size tiny --folder FOLDER --port PORT
"""

from __future__ import annotations

import importlib
import os
import runpy
import shlex
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import rehearsal

from vdtrain.engine.deepspeed import import_deepspeed

# What commands import late.
MODULES = (
    "data_pipeline.__main__",
    "data_pipeline.inspection",
    "data_pipeline.download.download",
    "data_pipeline.index.index",
    "data_pipeline.inspection",
    "miniature.image_set",
    "data_pipeline.select.select",
    "pandas",
    "published_weights",
    "vdtrain.cli",
    "vdtrain.diffusion.editing",
    "vdtrain.evaluation.parts",
    "vdtrain.commands.sampler",
    "vdtrain.run.session",
    "vdtrain.weights.diffusers_folder",
    "vdtrain.weights.exports",
    "vdtrain.weights.imports",
    "wandb",
)


class Fork:
    """A fork that runs `body`, with the part of `subprocess.Popen` that the rehearsal uses."""

    def __init__(self, body: Callable[[], int | None]) -> None:
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                status = body() or 0
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            except BaseException:
                traceback.print_exc()
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self) -> int:
        """The exit status, when there is one."""
        while (status := self.poll()) is None:
            time.sleep(0.02)
        return status


def start(command: str, folder: Path, log: IO[str]) -> Fork:
    """The fork of a command."""
    log.flush()

    def body() -> int | None:
        os.setsid()
        os.chdir(folder)
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        return run(shlex.split(command))

    return Fork(body)


def run(words: list[str]) -> int | None:
    program, *rest = words
    if program == "torchrun":
        return launch(int(rest[1].partition("=")[2]), rest[4:])
    if program == "vdtrain":
        return importlib.import_module("vdtrain.cli").main(rest)
    if rest[0] == "-c":
        exec(rest[1], {})
    elif rest[0] == "-m":
        return importlib.import_module(f"{rest[1]}.__main__").main(rest[2:])
    else:
        sys.argv = rest
        runpy.run_path(rest[0], run_name="__main__")
    return 0


def launch(count: int, arguments: list[str]) -> int:
    """What torchrun does: processes with its variables, and a word on how those ended that failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(number: int) -> Callable[[], int | None]:
        def body() -> int | None:
            os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            return importlib.import_module("vdtrain.commands.train").main(arguments)

        return body

    statuses = [fork.wait() for fork in [Fork(rank(number)) for number in range(count)]]
    for status in filter(None, statuses):
        print(f"exitcode  : {status}")
    return int(any(statuses))


if __name__ == "__main__":
    torch.set_num_threads(1)
    import_deepspeed("cpu")
    for module in MODULES:
        importlib.import_module(module)
    rehearsal.start = start
    # Forks are all called as this process is; W&B's program is not.
    rehearsal.training_processes = lambda pid: (
        [child for child in psutil.Process(pid).children() if child.name().startswith("python")]
        or [psutil.Process(pid)]
    )
    sys.exit(rehearsal.main())
