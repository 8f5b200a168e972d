"""Processes of `python -m data_pipeline latents`, forked from one, so that imports are paid once.

`python latent_processes.py FOLDER` runs the cases of FOLDER/cases.json one after another: each its ranks at once, with
the same arguments, the first of them killed at a batch where the case says so.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Case:
    ranks: int
    arguments: list[str]
    folder: str  # whose files are listed afterwards
    kill_at: int | None = None  # batch, from 0


@dataclass(frozen=True)
class Ending:
    """Exit statuses (negative for a signal) and output by rank; names of the folder's files, with their inodes."""

    statuses: list[int]
    logs: list[str]
    files: dict[str, int]


def run_cases(folder: Path, cases: list[Case]) -> list[Ending]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(Path(__file__)), str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=TIMEOUT_SECONDS)
    return [Ending(**ending) for ending in json.loads((folder / "endings.json").read_text())]


def serve(folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    from vdtrain.config.compose import compose, to_object
    from vdtrain.config.schema import TrainConfig
    from vdtrain.models.frozen import build_frozen

    # For what they import when they are first used, as the following does.
    for name in ("data_pipeline.latents.latents", "data_pipeline.latents.encoding", "vdtrain.run.distributed"):
        importlib.import_module(name)
    build_frozen(to_object(compose("train", ["model=tiny", "data=shapes"]), TrainConfig).model)
    endings = []
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        logs = [folder / f"{number}-{rank}.log" for rank in range(case["ranks"])]
        children = [_fork(rank, log, case) for rank, log in enumerate(logs)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        files = {str(path.relative_to(case["folder"])): path.stat().st_ino for path in _files(Path(case["folder"]))}
        endings.append({"statuses": statuses, "logs": [log.read_text() for log in logs], "files": files})
    (folder / "endings.json").write_text(json.dumps(endings))


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _fork(rank: int, log: Path, case: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["ranks"]))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        from data_pipeline.__main__ import main

        if case["kill_at"] is not None and rank == 0:
            _kill_at(case["kill_at"])
        status = main(["latents", *case["arguments"]])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _kill_at(batch: int) -> None:
    """End this process without a word when it encodes so many batches."""
    from vdtrain.models.image_vae import ImageVAE

    encode = ImageVAE.moments
    seen: list[int] = []

    def counting(self: Any, images: Any) -> Any:
        if len(seen) == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(1)
        return encode(self, images)

    ImageVAE.moments = counting  # type: ignore[method-assign]


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
