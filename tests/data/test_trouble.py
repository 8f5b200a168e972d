"""Reads that fail for a moment, of a real process whose disk is faulty, and of stores: the batches stay the same."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from tests import faults
from tests.data.test_remote_shards import Server
from tests.pairs import write_pairs
from vdtrain.data.stream import PairStream
from vdtrain.errors import passes
from vdtrain.storage.patience import Patience, StreamError

BATCHES = 9


def digest(folder: Path, latents: bool = False, **settings: object) -> str:
    """A checksum of a stream's first batches."""
    given = {"latents": str(folder / "latents"), "random_crop": False} if latents else {}
    stream = PairStream(folder / "manifest", seed=0, resolution=32, global_batch_size=8, **given, **settings)  # type: ignore[arg-type]
    found = hashlib.sha256()
    for batch in islice(stream, BATCHES):
        for tensor in (batch.samples["image"].contiguous(), *batch.moments.values()):
            found.update(tensor.numpy().tobytes())
        found.update(repr(batch.samples["text"]).encode())
    stream.close()
    return found.hexdigest()


def in_process(folder: Path, calls: list[str], *rules: str) -> tuple[list[str], list[str]]:
    """What a process with a faulty disk finds, one stream after another, and what it says."""
    found = ", ".join(f"digest(Path({str(folder)!r}), {call})" for call in calls)
    words = [sys.executable, "-c", f"from tests.data.test_trouble import *; print({found})"]
    environment = {**os.environ, **faults.variables(folder, *rules)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    return done.stdout.split()[-len(calls) :], lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data-trouble")
    write_pairs(folder, shards=3, count=12)
    words = ["model=tiny", "data=shapes", "hardware=cpu", f"data.manifest={folder}/manifest"]
    words += [f"data.latent_cache.folder={folder}/latents", "data.latent_cache.resolutions=[32]"]
    assert main(["latents", *words]) == 0
    return folder


def test_every_file_of_the_data_may_fail_for_a_moment(folder: Path) -> None:
    (rows,) = (path.name for path in (folder / "manifest").glob("samples-*.parquet"))
    rules = [
        f"open /manifest/shards.parquet errno={errno.EIO} times=1",
        f"read /manifest/{rows} errno={errno.ESTALE} times=1",
        f"open /latents/32/latents.json errno={errno.ETIMEDOUT} times=1",
        f"list /latents/32 errno={errno.EIO} times=1",
        f"read -000001- errno={errno.EIO} times=2",
        f"open -000002- errno={errno.EREMOTEIO} times=1",
        f"open /shards/000000.tar errno={errno.ENOTCONN} times=1",
        f"read /shards/000001.tar errno={errno.EIO} after=3 times=2",
        "read /shards/000002.tar short",
        "read -000000- short",
    ]
    (found,), said = in_process(folder, ["latents=True, workers=1"], *rules)
    assert found == digest(folder, latents=True)
    tried = [line for line in said if line.endswith("; trying again for 60 s")]
    for name in ("shards.parquet", rows, "latents.json", "-000001-", "-000002-", "000000.tar", "000001.tar"):
        assert any(name in line for line in tried), (name, said)
    # A line for every outage, and one for its end; the list of latents fails when their description can be read again.
    assert len(tried) == 7
    assert len(said) == 14


def test_a_cache_that_fails_costs_time_and_no_run(folder: Path) -> None:
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"{server.address}/manifest"
        rules = {
            "full": (f"write /full/ errno={errno.ENOSPC} after=1", "written (No space left on device); make room"),
            "failing": (f"stat /failing/ errno={errno.EIO}", "(Input/output error, the disk is failing)"),
        }
        calls = [f"cache={{'folder': {str(folder / name)!r}, 'gigabytes': 1}}, shard_root={root!r}" for name in rules]
        found, said = in_process(folder, calls, *(rule for rule, _ in rules.values()))
        assert found == [digest(folder)] * 2
        for (name, (_, reason)), line in zip(rules.items(), said, strict=True):
            assert str(folder / name) in line
            assert reason in line
            assert line.endswith("; meanwhile samples are read by ranges")
        server.shutdown()


def test_what_cannot_pass_is_not_repeated(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    patience, tries = Patience(60), []

    def fail(error: Exception) -> None:
        tries.append(1)
        raise error

    for number in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EMFILE, errno.ENAMETOOLONG):
        with pytest.raises(OSError, match=os.strerror(number)):
            patience.keep("a", lambda number=number: fail(OSError(number, os.strerror(number))))
    with pytest.raises(StreamError, match="said so"):
        patience.keep("a", lambda: fail(StreamError("said so", passes=False)))
    assert len(tries) == 7
    assert capfd.readouterr().err == ""


def test_outages_without_number_are_some_lines(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vdtrain.storage.patience.FIRST_PAUSE_SECONDS", 0.0001)
    patience = Patience(60)
    for _ in range(120):
        errors = [OSError(errno.EIO, "no")]
        patience.keep("http://me:word@h/a.tar", lambda errors=errors: fail_of(errors))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 * 11
    assert "word" not in "".join(said)
    with pytest.raises(StreamError, match=r"no, tried \d+ times in") as failure:
        Patience(0.01).keep("a", lambda: fail_of([OSError(errno.EIO, "no")] * 10**6))
    assert passes(failure.value)
    assert not failure.value.alone
    assert re.search("a: a read has not ended for 0 s", stuck())


def fail_of(errors: list[OSError]) -> None:
    if errors:
        raise errors.pop()


def stuck() -> str:
    """What is told of a read while it lasts."""
    patience, found = Patience(1), []
    patience.keep("a", lambda: found.append(patience.slowest()))
    assert patience.slowest() == ""
    return str(found[0])
