"""Ends a run that hangs, and records where every process stood.

    run_dir/dumps/rank-N.txt             Python stacks of all threads, the last collectives, what ended the process
    run_dir/dumps/collectives-rank-N     PyTorch's flight recorder, for `torchfrtrace`

Every process has its own watchdog. Those that wait for a hanging process stand still too, and report where, and which
process is late. The time during which a process was stopped does not count. What may take long, such as a save or a
compilation, stands still when no process of the run shows a sign of work (`pulse.py`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from vdtrain.redaction import without_secrets
from vdtrain.run import guard
from vdtrain.run.pulse import Pulse

if TYPE_CHECKING:
    from vdtrain.run.company import Company

EXIT_STATUS = 124
DUMPS = "dumps"
COLLECTIVES = "collectives-rank-"
# Collectives that the record in text names.
LAST_COLLECTIVES = 8
# Processor time alone counts as work for so many times the limit: a loop without end is a hang too.
BUSY_LIMITS = 6.0
# Share of the limit that a process waits between its report and its exit, so that the others can report too.
GRACE = 0.1
# Share of the limit after which an alert is sent.
STALL = 0.5
# A process that takes so much longer for a turn of its watchdog, without working, was stopped.
JUMP_SECONDS = 5.0
# A process tells the others how it fares that often, as a share of the limit.
TELL = 0.05


class Watchdog:
    """Watches the main thread of this process.

    Args:
        seconds: longest time between two heartbeats; with None only `record` has an effect.
        folder: for the records; created when needed.
    """

    def __init__(self, seconds: float | None, folder: Path, rank: int) -> None:
        self.seconds, self.folder, self.rank = seconds, folder, rank
        # What the main thread is doing. Setting it is not a heartbeat.
        self.place = "starting"
        self.company: Company | None = None
        self.heartbeats = 0
        # Seconds during which this process was stopped.
        self.absence = 0.0
        # Receives a line when training has stood still for STALL of the limit; it must return at once.
        self.on_stall: Callable[[str], None] | None = None
        self._alerted = False
        self._patience = 1.0
        # Seconds without a heartbeat or a sign of work; 0 without a limit.
        self.still = 0.0
        # Of the actions under way that may take long: whether the main thread reads or computes.
        self._long: list[bool] = []
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._pulse: Pulse | None = None
        if seconds is not None:
            self._pulse = Pulse(_pause(seconds), BUSY_LIMITS * seconds)
            # Armed before the thread first runs: a start with warm caches is at its first step by then.
            self._guard = _guard()
            self._arm()
            self._thread = threading.Thread(target=self._watch, args=(seconds,), name="watchdog", daemon=True)
            self._thread.start()

    def heartbeat(self, place: str) -> None:
        """Report progress: the main thread has reached `place`."""
        self.place, self.still = place, 0.0
        self.heartbeats += 1

    @contextlib.contextmanager
    def patient(self, place: str, factor: float = 1.0, reads: bool = True) -> Iterator[None]:
        """Allow one action at `place` to take long: work of any process that is in such an action is a heartbeat.

        Args:
            factor: how many times as long as a step it may take without a sign of work.
            reads: the main thread reads or computes. Otherwise only bytes that background threads move are work.
        """
        self._patience = factor
        self._long.append(reads)
        self.heartbeat(place)
        if self._pulse is not None:
            self._pulse.listen(True)
        try:
            yield
        finally:
            self.heartbeat(place)
            self._long.pop()
            self._patience = 1.0
            if self._pulse is not None:
                self._pulse.listen(bool(self._long))

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
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()
        if self._pulse is not None:
            self._pulse.close()

    def join(self, company: Company) -> None:
        """From now on, the processes of a run know how the others fare. Every process must call it."""
        self.company = company
        company.tell(0.0, self.heartbeats, self.place)
        if self._pulse is not None:
            self._pulse.share(company.store)

    def _watch(self, seconds: float) -> None:
        assert self._pulse is not None
        pause, told = _pause(seconds), 0.0
        before, worked = _clock(), time.process_time()
        while not self._closed.wait(pause):
            now, work = _clock(), time.process_time()
            passed = now - before
            if passed > pause + JUMP_SECONDS and work - worked < passed / 2:
                self._note_absence(passed - pause)
                passed = pause
            before, worked = now, work
            self._arm()
            self.still += passed
            long = self._long[-1:]
            if long and self._pulse.beats(long[0]):
                self.still = 0.0
            if self.company is not None and now - told > TELL * seconds:
                self.company.tell(self.still, self.heartbeats, self.place)
                told = now
            limit = self._patience * seconds
            stalls = self.still > STALL * limit
            if stalls and not self._alerted and self.on_stall is not None:
                self.on_stall(f"no step for {self.still:.0f} s, at: {self.place}; the run ends after {limit:g} s")
            self._alerted = stalls
            if self.still > limit:
                self._end(self.still)

    def _arm(self) -> None:
        """Rearm the watchdog's own watchdog: the watching thread needs Python's lock."""
        assert self.seconds is not None
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError):
            self._guard.stdin.write(f"{(1 + 2 * GRACE) * self._patience * self.seconds}\n".encode())

    def _note_absence(self, seconds: float) -> None:
        self.absence += seconds
        print(
            f"warning: process {self.rank} did not run for {seconds:.0f} s: it was stopped (SIGSTOP, Ctrl-Z), or its "
            "machine was suspended or moved",
            file=sys.stderr,
            flush=True,
        )

    def _end(self, still: float) -> None:
        limit = ("" if self._patience == 1.0 else f"{self._patience:g} x ") + f"watchdog_seconds={self.seconds:g}"
        reason = f"process {self.rank} stood still for {still:.0f} s, longer than {limit}, at: {self.place}"
        with contextlib.suppress(Exception):
            self.record(reason)
        late = "" if self.company is None else self.company.late(still, 2 * TELL * (self.seconds or 0.0))
        print(f"error: {reason}{late}; see {self.folder}", file=sys.stderr, flush=True)
        time.sleep(GRACE * (self.seconds or 0.0))
        # Destructors and other threads may never end.
        os._exit(EXIT_STATUS)

    def _write(self, file: IO[str], reason: str, error: BaseException | None) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(without_secrets(f"==== {now} {reason}\nat: {self.place}\n"))
        if error is not None:
            file.write(without_secrets("".join(traceback.format_exception(error))))
        for line in _last_collectives():
            file.write(f"collective: {line}\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.write("\n")


def _pause(seconds: float) -> float:
    """Between two looks."""
    return min(1.0, seconds / 10)


def _guard() -> subprocess.Popen[bytes]:
    """The process that ends this one if it hangs with Python's lock."""
    faulthandler.register(guard.DUMP, file=2, all_threads=True)
    words = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid())]
    return subprocess.Popen(words, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def _clock() -> float:
    """Seconds, those of a suspended machine included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


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
