"""Runs img2dataset on one part: starts, watches, restarts and stops it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from data_pipeline import shards
from data_pipeline.download import supervisor
from data_pipeline.download.command import img2dataset_command, img2dataset_environment, own_modules
from data_pipeline.download.plan import DownloadError, Part, Record, locked
from data_pipeline.failures import DNS, SUCCESS, DownloadStats
from vdtrain.config.data_schema import DownloadConfig

STALL_TIMEOUTS = 60  # restart a part whose shards have not grown for so many image timeouts
JUDGED_SHARDS = 3
FRUITLESS_STARTS = 2  # give up after so many starts in a row without a new shard


class PartRun:
    """img2dataset on one part, restarted as long as it makes progress; `close` ends all its processes.

    Attributes:
        tallies: one per complete shard.
    """

    def __init__(self, part: Part, config: DownloadConfig, allow_loopback: bool) -> None:
        """Lock the part, remove what an interrupted run left, and start the download of what is missing.

        Raises:
            ConfigError: shards were made with another plan.
            DownloadError: another download holds the part.
        """
        self.part, self._config, self._allow_loopback = part, config, allow_loopback
        self._process: subprocess.Popen[bytes] | None = None
        self.tallies: dict[Path, DownloadStats] = {}
        self._grown, self._size = 0.0, 0
        self._before = self._fruitless = 0
        self._stack = ExitStack()
        try:
            self._lock = self._stack.enter_context(locked(part))
            self._modules = self._stack.enter_context(own_modules(part, config))
            self.record = Record(part, config)
            part.folder.mkdir(exist_ok=True)
            part.beside(".log").write_text("")
            shards.settle(part.folder)
            shards.remove_unfinished(part.folder)
            self._take_in(running=False)
            if self._missing():
                self._start()
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        """Stop img2dataset and unlock the part."""
        self._stop()
        self._stack.close()

    @property
    def tally(self) -> DownloadStats:
        """Sum over all complete shards."""
        total = DownloadStats()
        for each in self.tallies.values():
            total.add(each)
        return total

    def step(self) -> bool:
        """Check the run and act on its state; returns whether the part is done.

        Raises:
            DownloadError: too few images arrive, or no more shards.
        """
        running = self._process is not None and self._process.poll() is None
        self._take_in(running)
        self._judge()
        if running and not self._overdue():
            return False
        self._stop()
        self._take_in(running=False)
        shards.remove_unfinished(self.part.folder)
        if self._missing():
            self._fruitless = 0 if len(self.tallies) > self._before else self._fruitless + 1
            if self._fruitless >= FRUITLESS_STARTS:
                raise DownloadError(
                    f"{self.part.folder}: {self._missing()} of {self.part.planned} shards are missing: "
                    f"{self._last_words()} (see {self.part.beside('.log')}); run it again"
                )
            self._start()
            return False
        shards.settle(self.part.folder)
        self.tallies.clear()
        self._take_in(running=False)
        low = [file for file, each in self.tallies.items() if self.record.is_low(each.settled_share, self._config)]
        if low:
            self.record.another_round()
            for file in low:
                shards.set_aside(file)
                del self.tallies[file]
            self._start()
            return False
        self.record.finish(self.tallies.values())
        return True

    def _take_in(self, running: bool) -> None:
        """Count new shards; remove damaged ones unless img2dataset may still be writing them."""
        for file in shards.finished(self.part.folder):
            if file in self.tallies:
                continue
            problem = shards.problem(file)
            if problem is None:
                self.tallies[file] = shards.tally(file)
            elif not running:
                print(f"{problem}; downloading it again", file=sys.stderr)
                shards.remove(file)

    def _overdue(self) -> bool:
        """Whether img2dataset should have ended: all shards are there, or nothing grows."""
        size = sum(file.stat().st_size for file in self.part.folder.glob("*.tar"))
        if size != self._size:
            self._grown, self._size = time.monotonic(), size
        timeouts = STALL_TIMEOUTS if self._missing() else 1
        return time.monotonic() - self._grown > timeouts * self._config.timeout

    def _judge(self) -> None:
        """Stop if too few images arrive; remove the poor shards, which would never be retried."""
        least, total = self._config.min_success_share, self.tally
        if (
            not self.tallies
            or len(self.tallies) < min(JUDGED_SHARDS, self.part.planned)
            or total.success_share >= least
        ):
            return
        self._stop()
        for file, each in self.tallies.items():
            if each.success_share < least:
                shards.remove(file)
        commonest = next((name for name, _ in total.reasons.most_common() if name != SUCCESS), "")
        if commonest == DNS:
            remedy = "run a caching resolver on this machine, or take fewer data.download.threads (docs/data.md)"
        elif total.transient * 2 > total.count:
            remedy = "see that the addresses can be reached from here, or take fewer data.download.threads"
        else:
            remedy = "if the set is no better than that, lower data.download.min_success_share"
        raise DownloadError(
            f"{self.part.folder}: {total}, fewer than data.download.min_success_share={least}; {remedy}"
        )

    def _missing(self) -> int:
        return self.part.planned - len(self.tallies)

    def _start(self) -> None:
        self._before = len(self.tallies)
        self._grown, self._size = time.monotonic(), 0
        command = [
            sys.executable,
            "-I",
            "-S",
            supervisor.__file__,
            *img2dataset_command(self.part, self._config, self._allow_loopback, self._modules),
        ]
        with self.part.beside(".log").open("a") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **img2dataset_environment(self._config, self._modules)},
                start_new_session=True,
                pass_fds=[self._lock],  # the part stays locked until the last writer is gone
            )

    def _stop(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _last_words(self) -> str:
        lines = self.part.beside(".log").read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "img2dataset printed nothing")
