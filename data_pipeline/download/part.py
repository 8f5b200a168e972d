"""A part of a download: its recorded plan, and img2dataset on it, which is started, watched, restarted and stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import data_pipeline
from data_pipeline import shards
from data_pipeline.download import supervisor
from data_pipeline.download.fetch import Limits
from data_pipeline.failures import DNS, SUCCESS, DownloadStats
from data_pipeline.select.selection import footer_hash
from data_pipeline.workers import alone
from vdtrain import redaction
from vdtrain.config.data_schema import DownloadConfig
from vdtrain.data.manifest import PLAN
from vdtrain.errors import ConfigError, one_line, unreadable
from vdtrain.files import SHAPE_ERRORS, atomic_write, read_json

# Settings that decide which image is in which shard, and how it is stored.
PLAN_SETTINGS = ("samples_per_shard", "image_size", "encode_quality", "min_image_size", "max_aspect_ratio")


@dataclass(frozen=True)
class Part:
    """One parquet file of URLs, and the folder of its shards."""

    source: str
    number: int
    urls: Path
    folder: Path
    rows: int
    planned: int  # shards

    @classmethod
    def of(cls, source: str, urls: Path, shards: Path, samples_per_shard: int) -> Part:
        rows = pq.read_metadata(urls).num_rows
        return cls(source, int(urls.stem), urls, shards / urls.stem, rows, -(-rows // samples_per_shard))

    def beside(self, suffix: str) -> Path:
        """A file beside the folder: img2dataset reads every .json within."""
        return self.folder.with_name(self.folder.name + suffix)


class Record:
    """`NUMBER.plan.json`: the plan of a part's shards, and the outcome.

    Attributes:
        rounds: how often low shards have been retried.
        outcome: over all shards, once they are complete.
        lowest: smallest settled share of a shard (`DownloadStats.settled_share`).
    """

    def __init__(self, part: Part, config: DownloadConfig) -> None:
        """Read it, or begin it; a ConfigError if shards were made with another plan."""
        self.file = part.beside(PLAN)
        self.rounds = 0
        self.outcome: DownloadStats | None = None
        self.lowest = 1.0
        # img2dataset numbers shards by row: a changed plan would mix two sets under the same numbers.
        self.plan: dict[str, Any] = {setting: getattr(config, setting) for setting in PLAN_SETTINGS}
        self.plan["selected"] = footer_hash(part.urls)
        begun = shards.begun(part.folder)
        if not self.file.exists():
            # An interrupted download has its plan: what is unfinished without one is no leftover to clear away.
            if begun or any(part.folder.glob("*.tar")):
                raise ConfigError(
                    f"data.sources.{part.source}.shards: {part.folder} has shards without {self.file.name}, which this "
                    "download did not make; give another folder"
                )
            self._write()
            return
        try:
            earlier = read_json(self.file)
            rounds, lowest = int(earlier["rounds"]), float(earlier["lowest"])
            outcome = earlier["outcome"] and DownloadStats.load(earlier["outcome"])
            changed = [
                f"data.sources.{part.source}.selected" if key == "selected" else f"data.download.{key}"
                for key in self.plan
                if self.plan[key] != earlier["plan"].get(key)
            ]
        except OSError as error:
            raise ConfigError(f"{self.file}: {unreadable(error, self.file, 'see that it can be read')}") from error
        except SHAPE_ERRORS as error:
            raise ConfigError(
                f"{self.file}: is damaged ({one_line(error)}); remove it and {part.folder} to download anew"
            ) from error
        if changed and begun:
            raise ConfigError(
                f"{', '.join(changed)}: changed since the shards in {part.folder} were made; change it back, or remove "
                "that folder to download anew"
            )
        if changed:
            self._write()
            return
        self.rounds = rounds
        if outcome and len(shards.finished(part.folder)) == part.planned:
            self.outcome, self.lowest = outcome, lowest

    def another_round(self) -> None:
        """Record that low shards are retried."""
        self.rounds += 1
        self.outcome = None
        self._write()

    def finish(self, tallies: Collection[DownloadStats]) -> None:
        """Record the outcome of the part's shards."""
        self.outcome = sum(tallies, DownloadStats())
        self.lowest = min([self.lowest, *(each.settled_share for each in tallies)])
        self._write()

    def is_low(self, settled_share: float, config: DownloadConfig) -> bool:
        """Whether a shard should be retried."""
        return settled_share < config.retry_below and self.rounds < config.retry_rounds

    def _write(self) -> None:
        document = {
            "plan": self.plan,
            "rounds": self.rounds,
            "outcome": self.outcome and self.outcome.dump(),
            "lowest": self.lowest,
        }
        with atomic_write(self.file) as draft:
            draft.write_text(json.dumps(document, indent=1), encoding="utf-8")


OPT_OUTS = ("noai", "noimageai", "noindex", "noimageindex", "noml")
# Time for the processes of a killed download to end.
LOCK_SECONDS = 30.0
IMAGE_TIMEOUTS = 3  # total time of an image, in units of data.download.timeout
# Not `-m`: workers unpickle classes by module name, and `__main__` differs between them.
RUN = "from data_pipeline.download.img2dataset_run import main; main()"


def img2dataset_command(part: Part, config: DownloadConfig, allow_loopback: bool, modules: Path) -> list[str]:
    """The command line that downloads the missing shards of a part; `modules` are those of `own_modules`."""
    limits = Limits(
        timeout=config.timeout,
        seconds=IMAGE_TIMEOUTS * config.timeout,
        max_bytes=config.max_bytes,
        retries=config.retries,
        allow_loopback=allow_loopback,
        user_agent=config.user_agent,
        opt_outs=OPT_OUTS,
    )
    options = {
        "url_list": str(part.urls),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": [name for name in pq.read_schema(part.urls).names if name not in ("url", "caption")],
        "output_format": "webdataset",
        "output_folder": str(part.folder),
        "distributor": config.distributor,
        "processes_count": config.processes,
        "thread_count": config.threads,
        "number_sample_per_shard": config.samples_per_shard,
        "oom_shard_count": 6,
        "image_size": config.image_size,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "encode_quality": config.encode_quality,
        "min_image_size": config.min_image_size,
        "max_aspect_ratio": config.max_aspect_ratio,
        "timeout": config.timeout,
        "disallowed_header_directives": list(OPT_OUTS),
    }
    document = {
        "img2dataset": options,
        "limits": asdict(limits),
        "cluster": config.cluster,
        "environment": img2dataset_environment(config, modules),
    }
    return [config.python or sys.executable, "-c", RUN, json.dumps(document)]


@contextmanager
def own_modules(part: Part, config: DownloadConfig) -> Iterator[Path]:
    """A new folder with what img2dataset's processes import of this project, which only this user can write.

    Another interpreter must not import this one's other packages. Python runs a sitecustomize.py of every folder that
    it imports from, so the folder cannot be one that others write. Other machines share only the disk of the shards.
    """
    shared = None if config.cluster is None else part.folder.parent.resolve()
    with tempfile.TemporaryDirectory(prefix=".vdtrain-modules-", dir=shared) as folder:
        modules = Path(folder)
        (modules / "data_pipeline").symlink_to(Path(data_pipeline.__file__).resolve().parent)
        (modules / "vdtrain").mkdir()
        (modules / "vdtrain" / "redaction.py").symlink_to(Path(redaction.__file__).resolve())
        yield modules


def img2dataset_environment(config: DownloadConfig, modules: Path) -> dict[str, str]:
    """Environment of img2dataset's processes, on all machines; `modules` as for `img2dataset_command`."""
    python = config.python or sys.executable
    return {
        "PYTHONPATH": str(modules),
        "PYTHONSAFEPATH": "1",
        "PYSPARK_PYTHON": python,
        "PYSPARK_DRIVER_PYTHON": python,
        "NO_ALBUMENTATIONS_UPDATE": "1",  # it queries the package index at every import
        "RAY_USAGE_STATS_ENABLED": "0",  # it reports usage to its makers
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(config.max_image_pixels),  # refuses a decompression bomb before decoding it
        "OMP_NUM_THREADS": "1",
    }


STALL_TIMEOUTS = 60  # restart a part whose shards have not grown for so many image timeouts
JUDGED_SHARDS = 3
FRUITLESS_STARTS = 2  # give up after so many starts in a row without a new shard


class PartRun:
    """img2dataset on one part, restarted as long as it makes progress; `close` ends all its processes."""

    def __init__(self, part: Part, config: DownloadConfig, allow_loopback: bool) -> None:
        """Lock the part, remove what an interrupted run left, and start the download of what is missing.

        Raises:
            ConfigError: shards were made with another plan, or another download holds the part.
        """
        self.part, self._config, self._allow_loopback = part, config, allow_loopback
        self._process: subprocess.Popen[bytes] | None = None
        self.tallies: dict[Path, DownloadStats] = {}  # of each complete shard
        self._grown, self._size = 0.0, 0
        self._before = self._fruitless = 0
        self._stack = ExitStack()
        try:
            self._lock = self._stack.enter_context(
                alone("download", part.beside(".lock"), str(part.folder), LOCK_SECONDS)
            )
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
        return sum(self.tallies.values(), DownloadStats())

    def step(self) -> bool:
        """Check the run and act on its state; returns whether the part is done.

        Raises:
            ConfigError: too few images arrive, or no more shards.
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
                raise ConfigError(
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
        raise ConfigError(f"{self.part.folder}: {total}, fewer than data.download.min_success_share={least}; {remedy}")

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
