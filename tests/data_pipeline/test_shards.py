"""Shards as img2dataset leaves them, and what is counted of them (under a second)."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from data_pipeline import shards
from data_pipeline.failures import DownloadStats, reason


def write_shard(folder: Path, number: int, images: int, failures: int = 0) -> Path:
    """A shard of three members to an image; returns its statistics."""
    with tarfile.open(folder / f"{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for image in range(images):
            for suffix in ("jpg", "txt", "json"):
                member = tarfile.TarInfo(f"{image:09d}.{suffix}")
                member.size = 700
                tar.addfile(member, io.BytesIO(bytes(700)))
    (folder / f"{number:06d}.parquet").touch()
    statistics = folder / f"{number:06d}_stats.json"
    counts = {"success": images} | ({"timed out": failures} if failures else {})
    statistics.write_text(json.dumps({"successes": images, "status_dict": counts}))
    return statistics


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_whole_shard(tmp_path: Path) -> None:
    for number, images in enumerate((0, 1, 4)):
        assert shards.problem(write_shard(tmp_path, number, images)) is None
    assert [shards.tally(file).successes for file in shards.finished(tmp_path)] == [0, 1, 4]


def test_every_cut_is_seen(tmp_path: Path) -> None:
    """At every block, of headers, contents and the two blocks of zeros at the end."""
    statistics = write_shard(tmp_path, 0, images=2)
    tar = tmp_path / "000000.tar"
    whole = tar.read_bytes()
    end = 2 * 3 * (512 + 1024) + 1024
    for cut in (*range(0, end, 512), 100, end - 1):
        tar.write_bytes(whole[:cut])
        assert shards.problem(statistics) == f"{tar}: cut short", cut
    tar.write_bytes(whole[:end])
    assert shards.problem(statistics) is None


def test_files_that_are_missing_or_another_count(tmp_path: Path) -> None:
    statistics = write_shard(tmp_path, 0, images=2)
    statistics.write_text(json.dumps({"successes": 3, "status_dict": {"success": 3}}))
    assert str(shards.problem(statistics)).endswith("2 samples instead of 3")
    statistics.write_text("")
    assert shards.problem(statistics) is not None
    write_shard(tmp_path, 0, images=2)
    (tmp_path / "000000.parquet").unlink()
    assert str(shards.problem(statistics)).endswith("its parquet file is missing")
    (tmp_path / "000000.tar").unlink()
    assert "No such file" in str(shards.problem(statistics))


def test_unfinished_shards_are_removed(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, images=1)
    write_shard(tmp_path, 1, images=1).unlink()
    shards.remove_unfinished(tmp_path)
    assert names(tmp_path) == ["000000.parquet", "000000.tar", "000000_stats.json"]


@pytest.mark.parametrize(("before", "after", "kept"), [(5, 3, 5), (3, 5, 5), (4, 4, 4)])
def test_the_better_attempt_is_kept(tmp_path: Path, before: int, after: int, kept: int) -> None:
    shards.set_aside(write_shard(tmp_path, 0, before))
    assert not list(tmp_path.glob("*.tar"))
    assert not list(tmp_path.glob("*.json"))
    shards.settle(tmp_path)
    assert len(names(tmp_path)) == 3  # the first attempt waits for the second
    assert shards.begun(tmp_path)
    statistics = write_shard(tmp_path, 0, after)
    shards.settle(tmp_path)
    assert names(tmp_path) == ["000000.parquet", "000000.tar", "000000_stats.json"]
    assert shards.problem(statistics) is None
    assert shards.tally(statistics).successes == kept


def test_an_attempt_that_lost_a_file_is_not_brought_back(tmp_path: Path) -> None:
    shards.set_aside(write_shard(tmp_path, 0, 5))
    (tmp_path / "000000.tar.before").unlink()
    statistics = write_shard(tmp_path, 0, 3)
    shards.settle(tmp_path)
    assert shards.tally(statistics).successes == 3
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize(
    ("message", "name", "transient"),
    [
        ("HTTP Error 404: Not Found", "HTTP 404", False),
        ("HTTP Error 429: Too Many Requests", "HTTP 429", True),
        ("HTTP Error 503: Service Unavailable", "HTTP 503", True),
        ("HTTP Error 302: The HTTP server returned a redirect error\nthat", "redirect loop", False),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "no answer from DNS", True),
        ("<urlopen error [Errno -2] Name or service not known>", "no such host", False),
        ("<urlopen error [Errno 111] Connection refused>", "connection lost", True),
        ("Remote end closed connection without response", "connection lost", True),
        ("IncompleteRead(3 bytes read, 7 more expected)", "connection lost", True),
        ("The read operation timed out", "too slow", True),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: x>", "TLS", False),
        ("redirect to private address", "address refused", False),
        ("opted out: X-Robots-Tag noai", "opted out", False),
        ("image too small", "image too small", False),
        ("'ascii' codec can't encode character '\\xfc' in position 12", "address that cannot be sent", False),
        ("unknown content encoding", "damaged or unknown content encoding", False),
        ("HTTP Error 300: Multiple Choices", "HTTP 300", False),
        ("[Errno 24] Too many open files: 'x'", "Too many open files", False),
        ("anything 17", "other (see error_message)", False),
        ("anything 18", "other (see error_message)", False),
    ],
)
def test_reasons(message: str, name: str, transient: bool) -> None:
    assert reason(message) == (name, transient)


def test_a_tally() -> None:
    tally = DownloadStats({"success": 6, "HTTP Error 404: Not Found": 3, "timed out": 1})
    tally += DownloadStats.load(tally.dump())
    assert (tally.count, tally.successes, tally.transient) == (20, 12, 2)
    assert (tally.success_share, tally.settled_share) == (0.6, 0.9)
    assert str(tally) == "12 of 20 images (60%); failed: 6 HTTP 404, 2 too slow"
