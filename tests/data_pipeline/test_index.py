"""Shards into a manifest: what is new is read, damaged shards are left out and named, an interrupted run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import data_pipeline.index.builder as builder_module
import data_pipeline.index.index as index_module
from data_pipeline.__main__ import main
from data_pipeline.index.index import index
from data_pipeline.index.shard_reading import ShardError, read_shard
from data_pipeline.workers import AHEAD, workers
from tests.pairs import all_samples, overwrite, write_pairs, write_shard
from vdtrain.data.manifest import SAMPLES_FILES, SHARDS_FILE, Manifest, ManifestError, read_shards
from vdtrain.errors import ConfigError, NothingError
from vdtrain.files import locked

# A run that comes to a halt where the third shard is to be read, until it is killed.
HALTS = """
import sys
from pathlib import Path
from data_pipeline.index import index as module
from data_pipeline.index.shard_reading import read_shard

def halting(path, *arguments):
    if path.name == "000002.tar":
        print("halted", flush=True)
        sys.stdin.read()
    return read_shard(path, *arguments)

module.read_shard = halting
module.index({"drawn": Path(sys.argv[1])}, Path(sys.argv[2]), file_shards=1)
"""


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are read, in this process."""
    names: list[str] = []

    def noting(path: Path, *arguments: object) -> object:
        names.append(path.name)
        return read_shard(path, *arguments)

    monkeypatch.setattr("data_pipeline.index.index.read_shard", noting)
    return names


def write_shards(folder: Path, numbers: range, count: int = 5) -> Path:
    for number in numbers:
        path = folder / "shards" / f"{number // 2:05d}" / f"{number:06d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, count, seed=number)
    return folder / "shards"


def content(manifest: Path) -> tuple[object, object]:
    return read_shards(manifest), all_samples(manifest)


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def test_only_new_shards_are_read_and_the_manifest_is_the_same_as_from_nothing(tmp_path: Path, read: list[str]) -> None:
    manifest = write_pairs(tmp_path, shards=2, count=5)
    write_shard(tmp_path / "shards" / "000002.tar", 5, seed=2)
    write_shard(tmp_path / "shards" / "000003.tar", 5, seed=3)
    (tmp_path / "shards" / "000003_stats.json").unlink()
    read.clear()
    index({"drawn": tmp_path / "shards"}, manifest)
    assert read == ["000002.tar"]
    assert len(Manifest(manifest)) == 15
    index({"drawn": tmp_path / "shards"}, tmp_path / "fresh")
    assert all_samples(manifest).equals(all_samples(tmp_path / "fresh"))
    places = ["samples_file", "row_group"]
    assert read_shards(manifest).drop_columns(places).equals(read_shards(tmp_path / "fresh").drop_columns(places))


def test_the_manifest_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, range(7))
    for processes in (1, 3):
        index({"drawn": shards}, tmp_path / str(processes), processes=processes, file_shards=2)
    assert sorted(file.name for file in (tmp_path / "3").iterdir()) == [
        *(SAMPLES_FILES.replace("*", f"{number:05d}") for number in range(4)),
        SHARDS_FILE,
    ]
    for file in (tmp_path / "1").iterdir():
        assert pq.read_table(file).equals(pq.read_table(tmp_path / "3" / file.name))


def test_shards_come_in_the_order_of_sources_and_paths(tmp_path: Path) -> None:
    sources = {name: write_shards(tmp_path / name, range(3)) for name in ("second", "first")}
    (sources["first"] / "00000" / "folder.tar").mkdir()
    (sources["first"] / "00000" / "folder_stats.json").write_text("{}")
    index(sources, tmp_path / "manifest")
    assert Manifest(tmp_path / "manifest").paths == [
        f"../{source}/shards/{part}/{shard}.tar"
        for source in sources
        for part, shard in (("00000", "000000"), ("00000", "000001"), ("00001", "000002"))
    ]


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path, read: list[str]) -> None:
    shards = write_shards(tmp_path, range(5))
    command = [sys.executable, "-c", HALTS, str(shards), str(tmp_path / "manifest")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"halted\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(Manifest(tmp_path / "manifest")) == 10
    # As if it had been killed between a file of samples and the list that names it, and while it wrote another.
    for leftover in ("samples-00002.parquet", "samples-00003.parquet.incomplete", "shards.parquet.incomplete"):
        (tmp_path / "manifest" / leftover).write_bytes(b"half")
    index({"drawn": shards}, tmp_path / "manifest", file_shards=1)
    assert read == ["000002.tar", "000003.tar", "000004.tar"]
    index({"drawn": shards}, tmp_path / "fresh", file_shards=1)
    assert sorted(os.listdir(tmp_path / "manifest")) == sorted(os.listdir(tmp_path / "fresh"))
    assert content(tmp_path / "manifest") == content(tmp_path / "fresh")


def test_a_list_that_takes_long_is_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of 300,000 shards takes five seconds, and its files of samples come every three."""
    shards, clock, written = write_shards(tmp_path, range(24)), [0.0], []

    def reading(*given: Any) -> Any:
        clock[0] += 3
        return read_shard(*given)

    def writing(folder: Path, table: Any) -> None:
        clock[0] += 5
        written.append(len(table))
        write_whole(folder, table)

    write_whole = builder_module.write_shards
    monkeypatch.setattr(builder_module, "write_shards", writing)
    monkeypatch.setattr(builder_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(index_module, "read_shard", reading)
    index({"drawn": shards}, tmp_path / "manifest", file_shards=1)
    assert written == [1, 24]
    monkeypatch.undo()
    index({"drawn": shards}, tmp_path / "fresh", file_shards=1)
    assert content(tmp_path / "manifest") == content(tmp_path / "fresh")


def touch(path: Path) -> Path:
    path.touch()
    return path


def test_workers_are_not_far_ahead_of_whoever_takes_their_results(tmp_path: Path) -> None:
    tasks = [tmp_path / str(number) for number in range(100)]
    with locked(tmp_path / "lock"), workers(2, "processes", tmp_path / "lock") as run:
        results = run(touch, tasks, "")
        assert next(results) == tasks[0]
        time.sleep(1)
        assert sum(task.exists() for task in tasks) <= 2 * AHEAD
        assert list(results) == tasks[1:]


@pytest.mark.parametrize("where", ["read_shard", "write_shards"])
def test_an_interrupted_run_leaves_what_was_there_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    shards = write_shards(tmp_path, range(3))
    index({"drawn": shards}, tmp_path / "manifest", file_shards=1)
    before = content(tmp_path / "manifest")
    write_shards(tmp_path, range(3, 6))
    # While a shard is read beside a draft with another; between a file of samples and the list that names it.
    module = index_module if where == "read_shard" else builder_module
    whole, calls = getattr(module, where), []

    def interrupted(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == 2 or where == "write_shards":
            raise KeyboardInterrupt
        return whole(*given, **named)

    monkeypatch.setattr(module, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        index({"drawn": shards}, tmp_path / "manifest", file_shards=2)
    monkeypatch.undo()
    names = {f"samples-{number:05d}.parquet" for number in range(3)} | {SHARDS_FILE}
    assert {file.name for file in (tmp_path / "manifest").iterdir()} == names
    assert content(tmp_path / "manifest") == before
    index({"drawn": shards}, tmp_path / "manifest")
    assert len(Manifest(tmp_path / "manifest").paths) == 6


@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_shards_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, processes: int
) -> None:
    shards = write_shards(tmp_path, range(5))
    cut(shards / "00000" / "000001.tar")
    # Only the first part has the plan of a download.
    (shards / "00000.plan.json").touch()
    (shards / "00001" / "000003_stats.json").write_text('{"successes": 9}')
    with pytest.raises(ShardError, match=r"2 of 5 shards are left out, each named above"):
        index({"drawn": shards}, tmp_path / "manifest", processes=processes)
    assert [Path(path).name for path in Manifest(tmp_path / "manifest").paths] == [
        "000000.tar",
        "000002.tar",
        "000004.tar",
    ]
    assert [message.partition("shards/")[2] for message in caplog.messages] == [
        "00000/000001.tar: cut short; remove it and 000001_stats.json, and download again",
        "00001/000003.tar: holds 5 samples of 9 that were downloaded; replace it by a whole copy, or name its folder "
        "by data.shards, which lists what is whole",
    ]
    write_shards(tmp_path, range(5))
    index({"drawn": shards}, tmp_path / "manifest")
    assert len(Manifest(tmp_path / "manifest")) == 25


def test_shards_that_are_gone_are_dropped_and_their_samples_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, read: list[str]
) -> None:
    shards = write_shards(tmp_path, range(5))
    index({"drawn": shards}, tmp_path / "manifest", file_shards=2)
    for name in ("00000/000000.tar", "00000/000001.tar"):
        (shards / name).unlink()
    read.clear()
    index({"drawn": shards}, tmp_path / "manifest", file_shards=2)
    assert caplog.messages == [
        "dropped: 2 shards that are gone: ../shards/00000/000000.tar, ../shards/00000/000001.tar"
    ]
    assert not read
    assert len(all_samples(tmp_path / "manifest")) == 15
    # A reader that still knows the file that was removed must not take another one for it.
    write_shards(tmp_path, range(2))
    index({"drawn": shards}, tmp_path / "manifest", file_shards=2)
    assert sorted(file.name for file in (tmp_path / "manifest").glob(SAMPLES_FILES)) == [
        f"samples-0000{number}.parquet" for number in (1, 2, 3)
    ]
    assert len(all_samples(tmp_path / "manifest")) == 25


def test_files_of_samples_that_are_missing_or_damaged_are_made_anew(tmp_path: Path, read: list[str]) -> None:
    shards = write_shards(tmp_path, range(5))
    index({"drawn": shards}, tmp_path / "manifest", file_shards=2)
    (tmp_path / "manifest" / "samples-00001.parquet").unlink()
    cut(tmp_path / "manifest" / "samples-00002.parquet")
    read.clear()
    index({"drawn": shards}, tmp_path / "manifest", file_shards=2)
    assert read == ["000002.tar", "000003.tar", "000004.tar"]
    index({"drawn": shards}, tmp_path / "fresh")
    assert all_samples(tmp_path / "manifest").equals(all_samples(tmp_path / "fresh"))


def test_a_shard_that_was_made_anew_is_read_again(tmp_path: Path, read: list[str]) -> None:
    shards = write_shards(tmp_path, range(3))
    index({"drawn": shards}, tmp_path / "manifest")
    read.clear()
    write_shard(shards / "00000" / "000001.tar", 4, seed=9)
    index({"drawn": shards}, tmp_path / "manifest")
    assert read == ["000001.tar"]
    index({"drawn": shards}, tmp_path / "fresh")
    assert all_samples(tmp_path / "manifest").equals(all_samples(tmp_path / "fresh"))


def test_images_are_decoded_if_that_is_asked_for_and_was_not_done(tmp_path: Path, read: list[str]) -> None:
    shards = write_shards(tmp_path, range(2))
    first = shards / "00000" / "000000.tar"
    row = read_shard(first, "drawn").samples.to_pylist()[2]
    with first.open("r+b") as file:
        file.seek(row["offset"] + row["size"] // 2)
        file.write(bytes(row["size"] // 2))
    index({"drawn": shards}, tmp_path / "manifest")
    assert len(Manifest(tmp_path / "manifest")) == 10
    for _ in range(2):
        index({"drawn": shards}, tmp_path / "manifest", decode=True)
    assert read == 2 * ["000000.tar", "000001.tar"]
    assert json.loads(read_shards(tmp_path / "manifest")["broken"][0].as_py()) == {"cannot be decoded: content": 1}
    # A manifest that knows more is good enough for a run that asks for less.
    index({"drawn": shards}, tmp_path / "manifest")
    assert len(read) == 4
    assert len(Manifest(tmp_path / "manifest")) == 9


def test_a_listed_shard_that_a_disk_has_damaged_leaves_the_manifest_when_it_is_read_again(tmp_path: Path) -> None:
    """Nothing else is new, so that only the shard that goes changes the manifest."""
    shards = write_shards(tmp_path, range(1))
    index({"drawn": shards}, tmp_path / "manifest", decode=True)
    write_shards(tmp_path / "more", range(1, 2))
    second = shards / "00000" / "000001.tar"
    for file in (tmp_path / "more" / "shards" / "00000").iterdir():
        file.rename(shards / "00000" / file.name)
    index({"drawn": shards}, tmp_path / "manifest")
    assert len(Manifest(tmp_path / "manifest").paths) == 2
    overwrite(second, 0, second.stat().st_size)
    with pytest.raises(ShardError, match=r"1 of 2 shards are left out"):
        index({"drawn": shards}, tmp_path / "manifest", decode=True)
    assert [Path(path).name for path in Manifest(tmp_path / "manifest").paths] == ["000000.tar"]


def test_pairs_that_are_listed_twice_are_counted_and_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = write_shards(tmp_path, range(3))
    again = shards / "again"
    again.mkdir()
    for file in (shards / "00000").glob("000001*"):
        (again / file.name).write_bytes(file.read_bytes())
    index({"drawn": shards}, tmp_path / "manifest")
    assert len(Manifest(tmp_path / "manifest")) == 20
    assert caplog.messages == [
        "listed more than once: 5 samples, as in ../shards/00000/000001.tar and ../shards/again/000001.tar; were the "
        "same rows downloaded twice?"
    ]


def test_only_one_run_writes_a_manifest(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, range(1))
    with locked(tmp_path / "manifest.lock"), pytest.raises(ConfigError, match="another index is writing there"):
        index({"drawn": shards}, tmp_path / "manifest")
    index({"drawn": shards}, tmp_path / "manifest")


def test_downloads_that_run_are_passed_over_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = write_shards(tmp_path, range(4))
    for number in (1, 3):
        next(shards.rglob(f"{number:06d}_stats.json")).unlink()
    index({"drawn": shards}, tmp_path / "manifest")
    assert caplog.messages == ["passed over: 2 .tar whose download has not finished"]
    assert len(Manifest(tmp_path / "manifest")) == 10


def test_what_cannot_be_indexed_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(NothingError, match=r"no \.tar in .* run `python -m data_pipeline download` first"):
        index({"drawn": tmp_path}, tmp_path / "manifest")
    shards = write_shards(tmp_path, range(1))
    with pytest.raises(ShardError, match=r"data\.sources\.part\.shards=.*lies in data\.sources\.drawn\.shards="):
        index({"drawn": shards, "part": shards / "00000"}, tmp_path / "manifest")
    with pytest.raises(ManifestError, match="data_pipeline index"):
        Manifest(tmp_path / "manifest")
    other = write_shards(tmp_path / "other", range(1))
    index({"drawn": shards, "other": other}, tmp_path / "manifest")
    other.rename(tmp_path / "away")
    with pytest.raises(ShardError, match=r"data\.sources\.other\.shards=.*no such folder, and .* lists 1 shards of it"):
        index({"drawn": shards, "other": other}, tmp_path / "manifest")
    assert len(Manifest(tmp_path / "manifest")) == 10
    next(shards.rglob("*_stats.json")).unlink()
    with pytest.raises(NothingError, match=r"none of 1 \.tar has finished its download"):
        index({"drawn": shards}, tmp_path / "manifest")


def test_the_command_ends_with_a_status_of_its_own_after_the_manifest_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path, range(2))
    settings = [
        "data=shapes",
        "~data.sources.coyo700m",
        f"data.sources.laion2b_en.shards={shards}",
    ]
    settings.append(f"data.manifest={tmp_path / 'manifest'}")
    cut(shards / "00000" / "000001.tar")
    assert main(["index", *settings]) == 2
    assert "1 of 2 shards are left out" in capsys.readouterr().err
    assert len(Manifest(tmp_path / "manifest")) == 5
    assert main(["index", *settings, "data.index.processes=0"]) == 2
    assert "data.index.processes=0: must be at least 1" in capsys.readouterr().err
    write_shards(tmp_path, range(2))
    assert main(["index", *settings]) == 0
    assert "10 samples in 2 shards, 2 of them new; left out: none" in capsys.readouterr().out
