"""One process of a test that runs on several: `python -m tests.training.ranks MODULE FUNCTION FOLDER`.

Started by the fixture `run_on_ranks`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from vdtrain.run import distributed

TIMEOUT_SECONDS = 60.0


def main(module: str, function: str, folder: Path) -> None:
    torch.set_num_threads(1)
    # NCCL wants a GPU to each process.
    kind = "cuda" if torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"]) else "cpu"
    place = distributed.start(kind, TIMEOUT_SECONDS)
    answer = folder / f"{function}-{place.rank}.json"

    def report(results: dict[str, Any]) -> None:
        answer.write_text(json.dumps({"results": results}))

    try:
        getattr(importlib.import_module(module), function)(folder, report)
    except BaseException:
        traceback.print_exc()
        answer.write_text(json.dumps({"failure": traceback.format_exc()}))
        raise
    distributed.finish()
    # A thread that outlives the interpreter's objects aborts the process, but only now and then.
    threads = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in thread for thread in threads), threads


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
