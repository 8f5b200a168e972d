"""Ranks of `vdtrain evaluate`, forked from one process so that imports are paid once.

`python forked_ranks.py FOLDER RANKS SETTING ...` starts them twice: the first time each gets a SIGTERM when it has kept
something for the first time. Rank N leaves FOLDER/N.log of the second time; FOLDER/statuses.json has all exit statuses.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

import vdtrain.evaluation.processes
import vdtrain.progress
from vdtrain.commands.evaluate import main
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.evaluation.parts import Parts
from vdtrain.models.frozen import build_frozen


def be_rank(rank: int, ranks: int, port: int, log: Path, arguments: list[str], stopped: bool) -> None:
    status = 70
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if stopped:
            stop_after_writing()
        vdtrain.progress.QUIET_SECONDS = vdtrain.progress.LINE_SECONDS = 0.0
        status = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def stop_after_writing() -> None:
    write = Parts.write

    def write_and_stop(self: Parts, *given: Any) -> None:
        write(self, *given)
        os.kill(os.getpid(), signal.SIGTERM)

    Parts.write = write_and_stop  # type: ignore[method-assign]


def run(folder: Path, ranks: int, arguments: list[str], stopped: bool) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            be_rank(rank, ranks, port, folder / f"{rank}.log", arguments, stopped)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    # For what they import when they are first used.
    importlib.import_module("matplotlib.pyplot")
    build_frozen(to_object(compose("train", ["model=tiny"]), TrainConfig).model)
    target, count = Path(sys.argv[1]), int(sys.argv[2])
    statuses = [run(target, count, sys.argv[3:], stopped) for stopped in (True, False)]
    (target / "statuses.json").write_text(json.dumps(statuses))
