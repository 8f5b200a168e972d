"""Images that come more than once are counted and named, and left out on request, whatever the order of the work."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.index.index import index
from data_pipeline.index.repeated import repeated_images
from tests.pairs import write_shard
from vdtrain.data.manifest import SHARDS_FILE, Manifest, read_shards
from vdtrain.data.stream import PairStream

PLACEHOLDERS = (200, 30)


def image(value: int, pixels: int = 64) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def write(path: Path, values: list[int]) -> None:
    """A finished shard with an image drawn from each value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number, value in enumerate(values):
            described = {"url": f"http://a/{path.stem}/{number}", "exif": "{}", "title": "a title"}
            sample = {
                "jpg": image(value),
                "txt": f"{path.stem} {number}".encode(),
                "json": json.dumps(described).encode(),
            }
            writer.write({"__key__": f"{number:06d}", **sample})
    path.with_name(path.stem + "_stats.json").write_text(json.dumps({"successes": len(values)}))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of ten: seven and four samples with the two placeholders, one image twice, and the others once."""
    first, second = PLACEHOLDERS
    write(tmp_path / "shards" / "a.tar", [0, first, first, second, 4, 5, 6, 7, 8, 9])
    write(tmp_path / "shards" / "b.tar", [10, first, first, first, second, second, 16, 17, 18, 10])
    write(tmp_path / "shards" / "c.tar", [first, first, second, 23, 24, 25, 26, 27, 28, 29])
    return tmp_path / "shards"


def captions(manifest: Path) -> set[str]:
    """Captions of the samples that take part."""
    content = Manifest(manifest)
    found: set[str] = set()
    for shard in range(len(content.paths)):
        rows = content.rows(shard)
        found |= {rows.captions[row].as_py() for row in np.flatnonzero(rows.side >= 0).tolist()}
    return found


def test_the_commands_count_name_and_leave_out(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest"
    settings = ["data=own", f"data.shards={shards}", f"data.manifest={manifest}"]
    assert main(["index", *settings]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("30 samples in 3 shards, 3 of them new; left out: none\n")
    frequent = ((7, "a.tar, key 000001"), (4, "a.tar, key 000003"), (2, "b.tar, key 000000"))
    named = "3 in 13 samples; most often " + "; ".join(f"{times} x ../shards/{place}" for times, place in frequent)
    assert f"one image more than once: {named}; data.index.drop_repeated=N leaves out" in printed
    assert main(["inspect", str(manifest), "data=own", "data.inspect.pixels=64", "data.inspect.images=5"]) == 0
    printed = capsys.readouterr().out
    assert f"one image more than once: {named}\n" in printed
    assert "contact sheet of 5 pairs, drawn at random, and the 3 most frequent images" in printed
    with Image.open(tmp_path / "inspect.png") as sheet:
        assert sheet.width == 8 * (64 + 16)
    before = Manifest(manifest)
    assert main(["index", *settings, "data.index.drop_repeated=2"]) == 0
    assert "19 samples in 3 shards, 0 of them new; left out: 11 repeated image" in capsys.readouterr().out
    after = Manifest(manifest)
    assert (len(after), after.counts(64).tolist(), after.counts(65).tolist()) == (19, [7, 5, 7], [0, 0, 0])
    assert after.identity != before.identity
    again = "data.inspect.overwrite=true"
    assert main(["inspect", str(manifest), "data=own", "data.inspect.pixels=64", "data.inspect.images=30", again]) == 0
    printed = capsys.readouterr().out
    assert "left out: 11 repeated image" in printed
    assert "contact sheet of 19 pairs" in printed
    stream = PairStream(manifest, seed=0, resolution=64, global_batch_size=19)
    assert set(next(iter(stream)).samples["text"]) == captions(manifest)
    stream.close()
    assert main(["index", *settings]) == 0
    assert Manifest(manifest).identity == before.identity


def test_the_order_of_the_work_changes_nothing(tmp_path: Path, shards: Path) -> None:
    index({"drawn": shards}, tmp_path / "once", drop_repeated=3)
    kept = captions(tmp_path / "once")
    assert len(kept) == 19
    index({"drawn": shards}, tmp_path / "parallel", drop_repeated=3, processes=2, file_shards=1)
    hidden = {path: path.with_suffix(".hidden") for path in (shards / "b.tar", shards / "c.tar")}
    for path, other in hidden.items():
        path.rename(other)
    # Two of the first placeholder are few enough until the other shards come.
    index({"drawn": shards}, tmp_path / "growing", drop_repeated=3)
    assert len(captions(tmp_path / "growing")) == 10
    for path, other in hidden.items():
        other.rename(path)
        index({"drawn": shards}, tmp_path / "growing", drop_repeated=3)
    columns = ["path", "samples", "sides", "side_counts", "left_out"]
    expected = read_shards(tmp_path / "once").select(columns).to_pylist()
    for name in ("parallel", "growing"):
        assert captions(tmp_path / name) == kept
        found = read_shards(tmp_path / name).select(columns).to_pylist()
        assert [{**row, "left_out": row["left_out"] or []} for row in found] == [
            {**row, "left_out": row["left_out"] or []} for row in expected
        ]
    # Fewer copies than allowed are left: they take part again.
    (shards / "b.tar").unlink()
    index({"drawn": shards}, tmp_path / "growing", drop_repeated=4)
    assert len(captions(tmp_path / "growing")) == 20


def test_the_settings_of_the_manifest_are_kept(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for read in (3, 0):
        index({}, tmp_path / "manifest", own=[shards], caption="title", drop_repeated=2)
        assert f"19 samples in 3 shards, {read} of them new" in capsys.readouterr().out


@pytest.mark.parametrize("max_hashes", [1 << 20, 8, 2])
def test_many_hashes_are_compared_in_parts(tmp_path: Path, shards: Path, max_hashes: int) -> None:
    index({"drawn": shards}, tmp_path / "manifest")
    content = Manifest(tmp_path / "manifest")
    found = repeated_images(content, 2, max_hashes)
    assert (found.images, found.samples, found.unknown, len(found.above)) == (3, 13, 0, 2)
    assert [tuple(each) for each in found.frequent] == [(7, 0, 1), (4, 0, 3), (2, 1, 0)]


def test_a_manifest_of_an_earlier_version_is_read_and_its_shards_only_if_they_must(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest"
    index({"drawn": shards}, manifest)
    for file in manifest.glob("*.parquet"):
        with pq.ParquetFile(file) as whole:
            tables = [whole.read_row_group(group) for group in range(whole.num_row_groups)]
        gone = "left_out" if file.name == SHARDS_FILE else "content"
        tables = [table.drop_columns([gone]) for table in tables]
        with pq.ParquetWriter(file, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)
    old = Manifest(manifest)
    assert (len(old), len(captions(manifest))) == (30, 30)
    assert repeated_images(old).unknown == 30
    assert "30 samples were indexed by an earlier version" in repeated_images(old).text(old)
    write_shard(shards / "d.tar", 4, seed=0)
    index({"drawn": shards}, manifest)
    assert re.search(r"34 samples in 4 shards, 1 of them new", capsys.readouterr().out)
    assert repeated_images(Manifest(manifest)).unknown == 30
    index({"drawn": shards}, manifest, drop_repeated=2)
    assert re.search(r"23 samples in 4 shards, 3 of them new; left out: 11 repeated", capsys.readouterr().out)
    assert pa.types.is_int64(Manifest(manifest).columns(0, ["content"])["content"].type)
