"""Disks and servers that fail while two real ranks train: waited for, or the run stops, saved, and goes on."""

from __future__ import annotations

import errno
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import faults
from tests.data.test_remote_shards import Server
from tests.pairs import write_pairs
from tests.programs import Ending, run_ranks
from tests.settings import TINY, phases
from tests.training.forks import Case, run_cases
from vdtrain.checkpoint.folder import CHECKPOINTS, candidates
from vdtrain.checkpoint.format import Index
from vdtrain.tracking.metrics import read_metrics

STEPS, BATCH, SHARDS, COUNT, LIMIT = 12, 2, 4, 10, 16
MINIATURE = [
    "stage=stage1_single_flow",
    *TINY,
    "stage.init_from=null",
    f"stage.global_batch_size={BATCH}",
    "hardware.micro_batch_size={32:1,64:1}",
    phases(BATCH, (32, STEPS)),
    "log_every_steps=1",
    "checkpoint.every_steps=100",
    f"watchdog_seconds={LIMIT}",
    "hardware.loader_workers=1",
    # One shard after the other.
    "data.stream.lanes=1",
    f"data.stream.block={COUNT}",
    "+data.stream.prefetch=1",
    "data.stream._target_=tests.training.trouble.DrillStream",
]


@dataclass(frozen=True)
class World:
    """`folder`/data, and `folder`/whole, a run without trouble; the shards in the order in which it reads them."""

    folder: Path
    order: list[str]

    def words(self, run: str, start: str, *more: str) -> list[str]:
        own = [f"data.manifest={self.folder}/data/manifest", f"run_dir={self.folder}/{run}"]
        return [*MINIATURE, *own, f"+data.stream.diary={self.folder}/{run}-{start}", *more]

    def train(self, run: str, *rules: str) -> Ending:
        """Two ranks with the faulty disk."""
        command = ["-m", "vdtrain", "train", *self.words(run, "first")]
        logs = [self.folder / f"{run}-{rank}.log" for rank in range(2)]
        return run_ranks([command] * 2, logs, 300, faults.variables(self.folder, *rules))

    def stopped(self, run: str) -> int:
        """The step at which a run stopped and saved."""
        (newest,) = candidates(self.folder / run / CHECKPOINTS)
        assert json.loads((self.folder / run / "saved.json").read_text())["step"] == int(newest.name[5:])
        return int(newest.name[5:])

    def go_on(self, run: str, *more: str) -> None:
        """The same command again ends as the run without trouble, bit for bit; no sample is lost or repeated."""
        step = self.stopped(run)
        (ending,) = run_cases(self.folder / f"{run}-again", [Case(2, self.words(run, "second", *more))])
        assert ending.statuses == [0, 0], ending
        assert f"continues from {self.folder}/{run}/checkpoints/step-{step:09d}" in ending.logs[0]
        self.compare(run)
        expected = self.rows("whole", "first")
        assert self.rows(run, "first")[:step] == expected[:step]
        assert self.rows(run, "second")[: STEPS - step] == expected[step:STEPS]

    def compare(self, run: str) -> None:
        one, other = (self.folder / name / CHECKPOINTS / f"step-{STEPS:09d}" for name in ("whole", run))
        for file in sorted(one.glob("*.safetensors")):
            expected, found = load_file(file), load_file(other / file.name)
            assert expected.keys() == found.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        first, second = Index.read(one), Index.read(other)
        assert first.trainer["state"] == second.trainer["state"]
        assert [each["step"] for each in read_metrics(self.folder / run)] == list(range(1, STEPS + 1))

    def rows(self, run: str, start: str) -> list[list[list[str]]]:
        """Shard and row of the samples of each batch that a start delivered, by rank."""
        files = [self.folder / f"{run}-{start}-{rank}" for rank in range(2)]
        by_rank = [[json.loads(line)["rows"] for line in file.read_text().splitlines()] for file in files]
        return [list(batch) for batch in zip(*by_rank, strict=False)]


def errors(ending: Ending) -> list[str]:
    return [line for log in ending.logs for line in log.splitlines() if line.startswith("error: ")]


def warnings(ending: Ending, rank: int) -> list[str]:
    """What a rank says of reads; on a busy machine it may say that it did not run for a while, too."""
    lines = [line for line in ending.logs[rank].splitlines() if line.startswith("warning: ")]
    return [line for line in lines if "trying again" in line or "read again" in line]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("trouble")
    write_pairs(folder / "data", shards=SHARDS, count=COUNT)
    world = World(folder, [])
    (ending,) = run_cases(folder / "cases", [Case(2, world.words("whole", "first"))])
    assert ending.statuses == [0, 0], ending
    shards = [int(row.split("/")[0]) for batch in world.rows("whole", "first") for rank in batch for row in rank]
    order = [f"shards/{shard:06d}.tar" for shard in dict.fromkeys(shards)]
    assert len(order) >= 3
    return World(folder, order)


def test_a_disk_that_errs_for_seconds_is_waited_for_and_one_that_goes_on_stops_all_ranks(world: World) -> None:
    first, second, *_ = world.order
    ending = world.train(
        "disk",
        f"read {first} errno={errno.ESTALE} after=2 seconds=3 rank=1",
        f"read {second} errno={errno.EIO} after=2 rank=1",
    )
    assert ending.statuses == [75, 75], ending
    stale, again, broken = warnings(ending, 1)
    assert f"{first}: cannot be read (Stale file handle, its file server does not answer); check the server" in stale
    assert stale.endswith(f"; trying again for {LIMIT / 2:g} s")
    assert re.search(rf"{first}: can be read again, after [2-9]\.[0-9] s$", again)
    assert f"{second}: cannot be read (Input/output error, the disk is failing); check the disk" in broken
    assert warnings(ending, 0) == []
    (line,) = errors(ending)
    step = world.stopped("disk")
    assert 0 < step < STEPS
    assert line in ending.logs[0]
    assert line.startswith("error: process 1: /")
    assert re.search(rf"`dmesg` shows its errors\), tried \d+ times in \d+ s; step {step} is saved, and the same", line)
    assert "Traceback" not in "".join(ending.logs)
    assert "StreamError" in (world.folder / "disk" / "dumps" / "rank-1.txt").read_text()
    world.go_on("disk")


@contextmanager
def server(folder: Path, port: int = 0) -> Iterator[Server]:
    """A server in this process; it can go away and come back at its port."""
    with Server(folder, port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_server_that_goes_away_is_waited_for_and_one_that_stays_away_stops_all_ranks(world: World) -> None:
    def serve() -> None:
        for number, requests in enumerate((8, 8)):
            with server(world.folder / "data", port) as present:
                up.set()
                while present.ranges.total() < requests:
                    time.sleep(0.01)
            if number == 0:
                time.sleep(3)

    with server(world.folder / "data") as first:
        port = first.server_address[1]
    up, thread = threading.Event(), threading.Thread(target=serve, daemon=True)
    thread.start()
    assert up.wait(10)
    address = f"http://127.0.0.1:{port}"
    remote = (f"data.stream.shard_root={address}/manifest", "data.stream.timeout=5")
    (ending,) = run_cases(world.folder / "server-cases", [Case(2, world.words("server", "first", *remote))])
    thread.join()
    assert ending.statuses == [75, 75], ending
    for rank in range(2):
        away, back, gone = warnings(ending, rank)
        assert re.match(rf"warning: {address}/shards/0\S+.tar: .*; check that it can be reached; trying again", away)
        assert re.search(r"tar: can be read again, after [2-9]\.[0-9] s", back)
        assert "trying again for 8 s" in gone
    (line,) = errors(ending)
    assert re.search(
        rf"error: (process 0 and 1 more: )?{address}/.*; check that it can be reached, tried \d+ times in [89] s", line
    )
    assert f"step {world.stopped('server')} is saved, and the same command continues" in line
    assert "Traceback" not in "".join(ending.logs)
    with server(world.folder / "data", port):
        world.go_on("server", *remote)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule", "statuses", "message"),
    [
        ("permission", f"read SHARD errno={errno.EACCES} after=2 rank=1", [1, 1], "cannot be read (permission denied"),
        ("missing", f"open SHARD errno={errno.ENOENT} rank=1", [1, 1], "is not there; bring it back, or index"),
        ("hang", "read SHARD hang after=2 rank=1", [75, 75], "a read has not ended for 1"),
    ],
)
def test_what_lasts_stops_all_ranks_at_once_and_what_hangs_before_the_watchdog(
    world: World, name: str, rule: str, statuses: list[int], message: str
) -> None:
    began = time.monotonic()
    ending = world.train(name, rule.replace("SHARD", world.order[1]))
    assert ending.statuses == statuses, ending
    (line,) = errors(ending)
    assert line.startswith("error: process 1: /")
    assert f"{world.order[1]}: {message}" in line
    assert f"step {world.stopped(name)} is saved, and the same command continues" in line
    assert warnings(ending, 1) == []
    assert time.monotonic() - began < 300
    world.go_on(name)
