"""Ranks of `vdtrain evaluate`, forked from one process so that imports are paid once.

`python forked_ranks.py FOLDER RANKS SETTING ...`; rank N leaves FOLDER/N.log, and the worst status is this process's.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

import torch

import vdtrain.evaluation.processes  # noqa: F401
from vdtrain.evaluate import main
from vdtrain.models import image_vae, optimus  # noqa: F401


def be_rank(rank: int, ranks: int, port: int, log: Path, arguments: list[str]) -> None:
    status = 70
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(folder: Path, ranks: int, arguments: list[str]) -> int:
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            be_rank(rank, ranks, port, folder / f"{rank}.log", arguments)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
