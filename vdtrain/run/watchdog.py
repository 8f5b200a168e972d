"""Ends a run that hangs, and records where every process stood.

    run_dir/dumps/rank-N.txt             Python stacks of all threads, the last collectives, what ended the process
    run_dir/dumps/collectives-rank-N     PyTorch's flight recorder, for `torchfrtrace`

Every process has its own watchdog. Those that wait for a hanging process stand still too, and report where.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch

EXIT_STATUS = 124
DUMPS = "dumps"
COLLECTIVES = "collectives-rank-"
# Collectives that the record in text names.
LAST_COLLECTIVES = 8
# Share of the limit that a process waits between its report and its exit, so that the others can report too.
GRACE = 0.1


class Watchdog:
    """Watches the main thread of this process.

    Args:
        seconds: longest time between two heartbeats; with None only `record` has an effect.
        folder: for the records; created when needed.
        rank: of this process.
    """

    def __init__(self, seconds: float | None, folder: Path, rank: int) -> None:
        self.seconds, self.folder, self.rank = seconds, folder, rank
        # What the main thread is doing. Setting it is not a heartbeat.
        self.place = "starting"
        self._patience = 1.0
        self._last_heartbeat = time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if seconds is not None:
            # Armed before the thread first runs: a start with warm caches is at its first step by then.
            _arm(seconds)
            self._thread = threading.Thread(target=self._watch, args=(seconds,), name="watchdog", daemon=True)
            self._thread.start()

    def heartbeat(self, place: str) -> None:
        """Report progress: the main thread has reached `place`."""
        self.place, self._last_heartbeat = place, time.monotonic()

    @contextlib.contextmanager
    def patient(self, place: str, factor: float) -> Iterator[None]:
        """Allow one action at `place` to take `factor` times as long as a step."""
        self._patience = factor
        self.heartbeat(place)
        try:
            yield
        finally:
            self.heartbeat(place)
            self._patience = 1.0

    def record(self, reason: str, error: BaseException | None = None) -> None:
        """Append the state of this process to its record: the reason, the error, all stacks, the last collectives."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.rank}.txt").open("a", encoding="utf-8") as file:
                self._write(file, reason, error)
            recorder = _flight_record("_dump_{}_trace")
            if recorder is not None:
                (self.folder / f"{COLLECTIVES}{self.rank}").write_bytes(recorder)
        except OSError as problem:
            print(f"process {self.rank}: {self.folder} cannot be written ({problem})", file=sys.stderr)
            self._write(sys.stderr, reason, error)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, seconds: float) -> None:
        pause = min(1.0, seconds / 10)
        while not self._closed.wait(pause):
            _arm(self._patience * seconds)
            still = time.monotonic() - self._last_heartbeat
            if still > self._patience * seconds:
                self._end(still)

    def _end(self, still: float) -> None:
        limit = ("" if self._patience == 1.0 else f"{self._patience:g} x ") + f"watchdog_seconds={self.seconds:g}"
        reason = f"process {self.rank} stood still for {still:.0f} s, longer than {limit}, at: {self.place}"
        with contextlib.suppress(Exception):
            self.record(reason)
        print(f"error: {reason}; see {self.folder}", file=sys.stderr, flush=True)
        time.sleep(GRACE * (self.seconds or 0.0))
        # Destructors and other threads may never end.
        os._exit(EXIT_STATUS)

    def _write(self, file: IO[str], reason: str, error: BaseException | None) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"==== {now} {reason}\nat: {self.place}\n")
        if error is not None:
            file.write("".join(traceback.format_exception(error)))
        for line in _last_collectives():
            file.write(f"collective: {line}\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.write("\n")


def _arm(seconds: float) -> None:
    """Rearm the watchdog's own watchdog.

    The watching thread needs Python's lock. If the main thread hangs while holding it, faulthandler takes over.
    """
    with contextlib.suppress(OSError):
        faulthandler.dump_traceback_later((1 + 2 * GRACE) * seconds, exit=True, file=2)


def record_collectives(folder: Path) -> None:
    """Make PyTorch record collectives, and write the record when one of them times out.

    PyTorch reads these variables when the process group starts. Variables that are already set stay.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_FR_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder.absolute() / COLLECTIVES))


def _flight_record(function: str) -> bytes | None:
    """The flight recorder's content, by a private function of PyTorch; None if there is none."""
    library: Any = getattr(torch._C, "_distributed_c10d", None)
    dump = getattr(library, function.format("nccl" if torch.cuda.is_available() else "fr"), None)
    try:
        return None if dump is None else bytes(dump())
    except RuntimeError:
        return None


def _last_collectives() -> list[str]:
    """The newest collectives, oldest first: name, group, sizes, state."""
    content = _flight_record("_dump_{}_trace_json")
    entries = json.loads(content).get("entries", []) if content else []
    return [
        f"{entry['profiling_name']} of group {entry['process_group'][0]}, number {entry['collective_seq_id']}, "
        f"{entry['input_sizes']}, {entry['state']}"
        for entry in entries[-LAST_COLLECTIVES:]
    ]
