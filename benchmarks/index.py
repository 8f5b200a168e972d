"""How fast shards are checked and listed, against reading and hashing them alone and against other tar readers.

python benchmarks/index.py [--folder /scratch]     # writes benchmarks/results/index.json

Every contestant goes over the same shards, in turn, round after round, in one process and out of the page cache; what
counts is processor time, so that other work on the machine disturbs it little. The shards are those of
benchmarks/loader.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webdataset
from loader_images import write_set

from data_pipeline.index.index import index
from data_pipeline.index.shard_reading import read_shard
from vdtrain.tracking.surroundings import processor, versions

RESULTS = Path(__file__).parent / "results"
PIECE = 1 << 20


def read_alone(shards: list[Path]) -> None:
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            buffer = bytearray(PIECE)
            while file.readinto(buffer):
                pass


def read_and_hash(shards: list[Path]) -> None:
    for shard in shards:
        with shard.open("rb") as file:
            hashlib.file_digest(file, "sha256").hexdigest()


def tarfile_members(shards: list[Path]) -> None:
    for shard in shards:
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                content.read()


def webdataset_samples(shards: list[Path]) -> None:
    for shard in shards:
        for _ in webdataset.WebDataset(str(shard), shardshuffle=False):
            pass


def check(shards: list[Path], decoded: bool = False) -> None:
    for shard in shards:
        assert not read_shard(shard, "photographs", decoded=decoded).broken


def whole_index(shards: list[Path]) -> None:
    manifest = shards[0].parent.parent / "manifest"
    shutil.rmtree(manifest, ignore_errors=True)
    index({"photographs": shards[0].parent}, manifest)


CONTESTANTS: dict[str, Callable[[list[Path]], None]] = {
    "read": read_alone,
    "read_and_sha256": read_and_hash,
    "tarfile_stream": tarfile_members,
    "webdataset": webdataset_samples,
    "check": check,
    "check_and_decode": lambda shards: check(shards, decoded=True),
    "index": whole_index,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1000, help="of each shard")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        write_set(folder, arguments.shards, arguments.samples, len(os.sched_getaffinity(0)))
        shards = sorted((folder / "shards").glob("*.tar"))
        size = sum(shard.stat().st_size for shard in shards)
        seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for _ in range(1 + arguments.rounds):
            for name, contestant in CONTESTANTS.items():
                began = time.process_time()
                contestant(shards)
                seconds[name].append(time.process_time() - began)
    finally:
        shutil.rmtree(folder)
    found: dict[str, Any] = {}
    for name, times in seconds.items():
        # The first round also loads what is loaded late.
        del times[0]
        middle = statistics.median(times)
        found[name] = {
            "megabytes_per_core_second": round(size / middle / 1e6),
            "samples_per_core_second": round(arguments.shards * arguments.samples / middle),
            "core_seconds_per_shard_of_10000": round(middle / arguments.shards / arguments.samples * 10_000, 2),
            "spread": round((max(times) - min(times)) / middle, 2),
        }
    ratios = {
        f"index_time_over_{name}": round(statistics.median(seconds["index"]) / statistics.median(seconds[name]), 2)
        for name in ("read_and_sha256", "tarfile_stream", "webdataset")
    }
    result = {
        "claim": "a manifest costs about twice what reading and hashing its shards alone costs",
        "processor": processor(),
        "bytes_per_sample": round(size / arguments.shards / arguments.samples),
        "shards": arguments.shards,
        "samples_per_shard": arguments.samples,
        "rounds": arguments.rounds,
        **ratios,
        "contestants": found,
        "versions": versions("numpy", "pillow", "pyarrow", "simplejpeg", "webdataset"),
    }
    print(json.dumps(result, indent=2))
    (RESULTS / "index.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
