"""The manifest's format: reading returns what was written; damaged and foreign files are refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pairs import all_samples
from vdtrain.data import manifest as manifest_module
from vdtrain.data.manifest import (
    SAMPLE_SCHEMA,
    SHARD_SCHEMA,
    SHARDS_FILE,
    Manifest,
    ManifestError,
    SamplesWriter,
    read_shards,
    write_shards,
)

SHARDS = {"../shards/a/000.tar": 5, "../shards/a/001.tar": 0, "../shards/b/000.tar": 3, "/mnt/b/001.tar": 7}


def samples(name: str, count: int, seed: int) -> pa.Table:
    generator = np.random.default_rng(seed)
    columns = {
        "uid": [f"{seed:016x}{number:016x}" for number in range(count)],
        "shard": [name] * count,
        "key": [f"{number:06d}" for number in range(count)],
        "offset": np.arange(count) * 10_240 + 512,
        "size": generator.integers(1_000, 9_000, count),
        "orientation": generator.integers(1, 9, count),
        "width": generator.integers(100, 700, count),
        "height": generator.integers(100, 700, count),
        "caption": [f"{name} größer 猫 {number}" for number in range(count)],
    }
    return pa.table(columns).cast(SAMPLE_SCHEMA)


def write(folder: Path, file_shards: int = 3) -> list[pa.Table]:
    """Write four shards in two files; returns their samples."""
    tables = [samples(name, count, seed) for seed, (name, count) in enumerate(SHARDS.items())]
    rows = []
    for first in range(0, len(SHARDS), file_shards):
        writer = SamplesWriter(folder, f"samples-{first:05d}.parquet")
        for name, table in list(zip(SHARDS, tables, strict=True))[first : first + file_shards]:
            row = {"path": name, "source": "b" if "b/" in name else "a", "bytes": 1 << 40, "modified_ns": 1}
            writer.add({**row, "sha256": "0" * 64, "broken": "{}", "decoded": False}, table)
        writer.close()
        rows += writer.rows
    write_shards(folder, pa.Table.from_pylist(rows, SHARD_SCHEMA))
    return tables


def test_a_manifest_with_a_column_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    tables = write(tmp_path)
    for file in tmp_path.glob("samples-*.parquet"):
        with pq.ParquetFile(file) as old:
            groups = [old.read_row_group(number) for number in range(old.num_row_groups)]
        hashed = [group.append_column("caption_hash", pa.array(range(len(group)), pa.uint64())) for group in groups]
        with pq.ParquetWriter(file, hashed[0].schema) as writer:
            for group in hashed:
                writer.write_table(group)
    assert all_samples(tmp_path).equals(pa.concat_tables(tables))
    assert Manifest(tmp_path).rows(0).captions.to_pylist() == tables[0]["caption"].to_pylist()


def test_a_reader_keeps_few_footers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A footer takes more than a megabyte; 300,000 shards have 3,000 of them."""
    tables = write(tmp_path, file_shards=1)
    monkeypatch.setattr(manifest_module, "FOOTERS", 2)
    manifest = Manifest(tmp_path)
    for _ in range(2):
        for shard, table in enumerate(tables):
            assert manifest.columns(shard, ["key"])["key"].to_pylist() == table["key"].to_pylist()
    assert manifest._footer.cache_info().currsize == 2


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tables = write(tmp_path)
    manifest = Manifest(tmp_path)
    assert manifest.paths == list(SHARDS)
    assert manifest.samples.tolist() == list(SHARDS.values())
    assert len(manifest) == 15
    assert [manifest.source_names[number] for number in manifest.sources] == ["a", "a", "b", "b"]
    assert all_samples(tmp_path).equals(pa.concat_tables(tables))
    for shard, table in enumerate(tables):
        rows = manifest.rows(shard)
        assert len(rows) == len(table)
        for name in ("offset", "size", "orientation"):
            assert getattr(rows, name).tolist() == table[name].to_pylist()
        assert rows.captions.to_pylist() == table["caption"].to_pylist()
        assert rows.side.tolist() == np.minimum(table["width"], table["height"]).tolist()
        assert manifest.columns(shard, ["uid", "key"]).equals(table.select(["uid", "key"]))


def test_shards_tell_how_many_samples_are_large_enough(tmp_path: Path) -> None:
    tables = write(tmp_path)
    manifest = Manifest(tmp_path)
    sides = [np.minimum(table["width"], table["height"]) for table in tables]
    edges = {0, 1000, *(int(side) + more for each in sides for side in each for more in (0, 1))}
    for edge in edges:
        assert manifest.counts(edge).tolist() == [int((each >= edge).sum()) for each in sides]


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    tables = write(tmp_path)
    manifest = Manifest(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        shards = [shard for _ in range(25) for shard in range(len(tables))]
        for shard, rows in zip(shards, pool.map(manifest.rows, shards), strict=True):
            assert rows.offset.tolist() == tables[shard]["offset"].to_pylist()


@pytest.mark.parametrize(
    ("root", "first", "last"),
    [
        (None, "{parent}/shards/a/000.tar", "/mnt/b/001.tar"),
        ("/data/manifest", "/data/shards/a/000.tar", "/mnt/b/001.tar"),
        ("s3://bucket/set/manifest", "s3://bucket/set/shards/a/000.tar", "/mnt/b/001.tar"),
        ("https://host:80/set/manifest/", "https://host:80/set/shards/a/000.tar", "/mnt/b/001.tar"),
    ],
)
def test_shards_are_found_under_a_root(tmp_path: Path, root: str | None, first: str, last: str) -> None:
    write(tmp_path / "manifest")
    manifest = Manifest(tmp_path / "manifest", root)
    assert manifest.shards[0] == first.format(parent=tmp_path)
    assert manifest.shards[-1] == last


def test_a_file_of_samples_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    writer = SamplesWriter(tmp_path, "samples-00000.parquet")
    writer.add({"path": "a.tar"}, samples("a.tar", 4, 0))
    assert not writer.path.exists()
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["samples-00000.parquet"]
    assert pq.read_metadata(writer.path).num_rows == 4


def test_a_list_of_shards_that_could_not_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    before = read_shards(tmp_path)

    def full(table: pa.Table, path: Path, **settings: object) -> None:
        path.write_bytes(b"PAR1 half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest_module.pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        write_shards(tmp_path, before.slice(0, 1))
    assert read_shards(tmp_path).equals(before)


def test_what_is_missing_or_damaged_names_the_remedy(tmp_path: Path) -> None:
    assert len(read_shards(tmp_path)) == 0
    with pytest.raises(ManifestError, match=rf"data\.manifest={tmp_path}: shards\.parquet is not there; make it with"):
        Manifest(tmp_path)
    write(tmp_path)
    manifest = Manifest(tmp_path)
    (tmp_path / "samples-00003.parquet").unlink()
    with pytest.raises(
        ManifestError, match=r"samples-00003\.parquet is not there; run `python -m data_pipeline index`"
    ):
        manifest.rows(3)
    (tmp_path / "samples-00000.parquet").write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(ManifestError, match=r"samples-00000\.parquet cannot be read"):
        Manifest(tmp_path).rows(0)
    content = (tmp_path / SHARDS_FILE).read_bytes()
    (tmp_path / SHARDS_FILE).write_bytes(content[: len(content) // 2])
    for reading in (Manifest, read_shards):
        with pytest.raises(
            ManifestError, match=r"shards\.parquet cannot be read .*; move the folder .* away and make it again"
        ):
            reading(tmp_path)


@pytest.mark.parametrize("file", [SHARDS_FILE, "samples-00000.parquet"])
def test_names_of_columns_that_are_not_utf8_are_one_line(tmp_path: Path, file: str) -> None:
    """pyarrow raises a UnicodeDecodeError, which is not one of its own errors."""
    write(tmp_path)
    damaged = tmp_path / file
    damaged.write_bytes(damaged.read_bytes().replace(b"sha256", b"sha25\xbb").replace(b"caption", b"captio\xbb"))
    with pytest.raises(ManifestError, match=rf"^data\.manifest=.*: {file} .*move the folder .* away") as told:
        Manifest(tmp_path).rows(0)
    assert "\n" not in str(told.value)


def test_a_noted_setting_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    write(tmp_path)
    shards = pq.read_table(tmp_path / SHARDS_FILE).replace_schema_metadata({"data.index.members": b"\xbb"})
    pq.write_table(shards, tmp_path / SHARDS_FILE)
    with pytest.raises(ManifestError, match=r"shards\.parquet is damaged .*; move the folder"):
        _ = Manifest(tmp_path).modalities


def test_a_manifest_of_another_layout_is_refused_in_one_line(tmp_path: Path) -> None:
    write(tmp_path)
    pq.write_table(read_shards(tmp_path).drop_columns(["sides", "decoded"]), tmp_path / SHARDS_FILE)
    for reading in (Manifest, read_shards):
        with pytest.raises(ManifestError, match=r"move the folder .* away and make it again") as raised:
            reading(tmp_path)
        assert "\n" not in str(raised.value)
