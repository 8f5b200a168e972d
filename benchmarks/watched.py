"""What the processes that this one starts take while they run: seconds, memory, disk."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

POLL_SECONDS = 0.05
# To walk a folder costs more than to ask the system for the memory of a few processes.
DISK_POLL_SECONDS = 1.0
GB = 1e9


class Watched:
    """Watches all descendants of this process from a thread, and what a folder holds, until the block is left.

    Attributes:
        seconds: since the block was entered.
        own: most bytes of memory that the descendants held together, without pages of files.
        resident: the same with pages of files, which the system can take back; counted once per process.
        disk: most bytes that the folder held.

    Args:
        folder: None watches no disk.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.seconds, self.own, self.resident, self.disk = 0.0, 0, 0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._start
        self._look_at_disk()

    def _watch(self) -> None:
        this, looked = psutil.Process(), -DISK_POLL_SECONDS
        while not self._done.wait(POLL_SECONDS):
            own = resident = 0
            for process in this.children(recursive=True):
                try:
                    memory = process.memory_info()
                except psutil.Error:
                    continue  # it has just ended
                own += memory.rss - memory.shared
                resident += memory.rss
            self.own, self.resident = max(self.own, own), max(self.resident, resident)
            if time.monotonic() - looked > DISK_POLL_SECONDS:
                self._look_at_disk()
                looked = time.monotonic()

    def _look_at_disk(self) -> None:
        if self.folder is not None:
            self.disk = max(self.disk, disk_bytes(self.folder))


def disk_bytes(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # it has just been renamed or removed
    return total
