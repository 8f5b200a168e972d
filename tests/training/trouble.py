"""What befalls a rank in the drills, and a stream that writes down what it delivers."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vdtrain.checkpoint import store as checkpoints
from vdtrain.data.batch import Batch
from vdtrain.data.stream import PairStream, StreamError

SMALL_DISK_BYTES = 100_000

# Set by `prepare` in the process of one case.
plan: dict[str, Any] = {}
counts = {"open": 0, "batch": 0, "write": 0, "publish": 0}


def prepare(trouble: dict[str, Any]) -> None:
    """Let `trouble` befall its rank.

    Args:
        trouble: rank; what: a signal's name, or sleep, hold (sleep with Python's lock), pause (stopped
            for `seconds`), stream_error or full_disk (with
            room again after `until` batches); when: open (of a stream), batch (before its delivery), write (in the
            middle of a file) or publish (between the renames); number: how many of these pass before. Or when: place;
            number: of a batch in its phase; what may then be nan, in the batch's images.
    """
    if int(os.environ["RANK"]) == trouble["rank"]:
        plan.update(trouble)
        checkpoints.write_tensors = _writing(checkpoints.write_tensors)
        checkpoints.write_text = _publishing(checkpoints.write_text)


def _reach(when: str) -> None:
    if plan.get("when") == when and counts[when] == plan["number"]:
        _befall(plan["what"])
    counts[when] += 1


def _befall(what: str) -> None:
    print(f"drill: {what}", flush=True)
    if what == "sleep":
        time.sleep(3600)
    elif what == "hold":
        # PyDLL keeps Python's lock for as long as the call lasts.
        ctypes.PyDLL(None).sleep(3600)
    elif what == "full_disk":
        # Of files that are written from now on, only so many bytes find room.
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK_BYTES, resource.RLIM_INFINITY))
    elif what == "stream_error":
        raise StreamError("shard 7: is not there; bring it back")
    elif what == "pause":
        subprocess.Popen(["sh", "-c", f"sleep {plan['seconds']}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        os.kill(os.getpid(), getattr(signal, what))


def _writing(write: Any) -> Any:
    def wrapped(path: Path, tensors: Any) -> Any:
        if plan["when"] == "write" and plan["what"] == "SIGKILL" and counts["write"] == plan["number"]:
            path.write_bytes(b"half of it")
        _reach("write")
        return write(path, tensors)

    return wrapped


def _publishing(write: Any) -> Any:
    def wrapped(path: Path, text: str) -> None:
        _reach("publish")
        write(path, text)

    return wrapped


class DrillStream(PairStream):
    """Appends every batch that it delivers to a file: phase seed, positions and manifest rows.

    Args:
        diary: the file, with the rank at its end.
    """

    def __init__(self, manifest: Path, *, diary: str, **arguments: Any) -> None:
        super().__init__(manifest, **arguments)
        self.diary = Path(f"{diary}-{self.rank}")
        _reach("open")

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            _reach("batch")
            if counts["batch"] == plan.get("until"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            positions = batch.positions.numpy()
            if plan.get("when") == "place" and positions[0] // self.global_batch_size == plan["number"]:
                if plan["what"] == "nan":
                    images = batch.samples["image"].float() * torch.nan
                    batch = replace(batch, samples={**batch.samples, "image": images})
                else:
                    _befall(plan["what"])
            places = self.order.locate(positions)
            each = zip(places.shard.tolist(), places.sample.tolist(), strict=True)
            rows = [f"{shard}/{self._samples(shard)[1][sample]}" for shard, sample in each]
            line = {"seed": self.seed, "positions": positions.tolist(), "rows": rows}
            with self.diary.open("a") as file:
                file.write(json.dumps(line) + "\n")
            yield batch


class PoisonStream(PairStream):
    """Gives one sample of a batch moments that are not finite.

    Args:
        rank_of_poison, batch, row: of the sample, from 0.
    """

    def __init__(self, manifest: Path, *, rank_of_poison: int, batch: int, row: int, **arguments: Any) -> None:
        super().__init__(manifest, **arguments)
        self.place = rank_of_poison, batch, row

    def __iter__(self) -> Iterator[Batch]:
        rank, poisoned, row = self.place
        for number, batch in enumerate(super().__iter__()):
            moments = torch.zeros(self.local_batch_size, 8, self.resolution // 8, self.resolution // 8)
            if (self.rank, number) == (rank, poisoned):
                moments[row] = torch.nan
            yield replace(batch, moments={"image": moments})
