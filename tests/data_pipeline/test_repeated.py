"""Names that come more than once are counted exactly, or estimated from a random part where there are too many."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.index.repeated import repeated_uids
from vdtrain.data.manifest import SAMPLE_SCHEMA, SHARD_SCHEMA, Manifest, SamplesWriter, write_shards


def write_names(folder: Path, shards: list[list[str]]) -> Manifest:
    writer = SamplesWriter(folder, "samples-00000.parquet")
    for number, uids in enumerate(shards):
        columns = {name: np.ones(len(uids)) for name in SAMPLE_SCHEMA.names}
        texts = {name: [""] * len(uids) for name in ("shard", "key", "caption")}
        table = pa.table({**columns, **texts, "uid": uids}).cast(SAMPLE_SCHEMA)
        shard = {"path": f"{number}.tar", "source": "drawn", "bytes": 1024, "modified_ns": 0, "sha256": ""}
        writer.add({**shard, "broken": "{}", "decoded": False}, table)
    writer.close()
    write_shards(folder, pa.Table.from_pylist(writer.rows, SHARD_SCHEMA))
    return Manifest(folder)


def names(numbers: range) -> list[str]:
    return [hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest() for number in numbers]


@pytest.mark.parametrize(
    ("shards", "count", "example"),
    [
        ([range(0), range(50), range(50, 90)], 0, None),
        ([range(50), range(0), range(40, 90)], 10, ("0.tar", "2.tar")),
        ([range(50), range(50), range(50)], 100, ("0.tar", "1.tar")),
    ],
)
def test_names_are_counted(tmp_path: Path, shards: list[range], count: int, example: tuple[str, str] | None) -> None:
    found = repeated_uids(write_names(tmp_path, [names(each) for each in shards]))
    assert (found.samples, found.compared) == (count, 1.0)
    # Which name comes first among those that are repeated is nobody's matter.
    assert (
        found.example is None if example is None else found.example in (example, ("0.tar", "2.tar"), ("1.tar", "2.tar"))
    )


def test_a_manifest_without_samples_repeats_nothing(tmp_path: Path) -> None:
    assert repeated_uids(write_names(tmp_path, [[]])).samples == 0


def test_of_many_names_a_random_part_is_compared(tmp_path: Path) -> None:
    manifest = write_names(tmp_path, [names(range(3000)), names(range(1000, 4000))])
    found = repeated_uids(manifest, max_uids=1024)
    assert found.compared == 1 / 8
    # 2,000 pairs, of which each is in the part with probability 1/8: five standard deviations of the estimate are 590.
    assert abs(found.samples - 2000) < 590
