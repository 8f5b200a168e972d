"""Every published variant of the metadata comes out in its set's one schema; what cannot is named (under a second)."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.select.metadata_files import metadata_files
from data_pipeline.select.sources import SCHEMAS, FileColumns, find_columns, read_columns
from vdtrain.config.compose import ConfigError

LAION = {"URL": pa.string(), "TEXT": pa.string(), "similarity": pa.float64()}
LAION_VARIANTS: dict[str, dict[str, pa.DataType]] = {
    "laion2B-en": {
        "SAMPLE_ID": pa.int64(),
        **LAION,
        "HEIGHT": pa.int32(),
        "WIDTH": pa.int32(),
        "LICENSE": pa.string(),
        "NSFW": pa.string(),
    },
    "laion2B-en, other parts": {
        "SAMPLE_ID": pa.int64(),
        **LAION,
        "HEIGHT": pa.float64(),
        "WIDTH": pa.float64(),
        "LICENSE": pa.string(),
        "NSFW": pa.string(),
        "__index_level_0__": pa.int64(),
    },
    "laion2B-en-joined": {
        **LAION,
        "WIDTH": pa.int32(),
        "HEIGHT": pa.int32(),
        "hash": pa.int64(),
        "punsafe": pa.float32(),
        "pwatermark": pa.float32(),
    },
    "laion2B-en-aesthetic": {
        **LAION,
        "WIDTH": pa.float64(),
        "HEIGHT": pa.float64(),
        "hash": pa.int64(),
        "punsafe": pa.float32(),
        "pwatermark": pa.float32(),
        "aesthetic": pa.float32(),
    },
    "laion-art": {**LAION, "hash": pa.int64(), "pwatermark": pa.float64(), "AESTHETIC_SCORE": pa.float64()},
    "laion2B-en-md5": {
        **LAION,
        "WIDTH": pa.int32(),
        "HEIGHT": pa.int32(),
        "hash": pa.int64(),
        "punsafe": pa.float32(),
        "pwatermark": pa.float32(),
        "md5": pa.string(),
    },
    "lower case": {
        "url": pa.large_string(),
        "caption": pa.large_string(),
        "width": pa.int64(),
        "height": pa.int64(),
        "nsfw": pa.dictionary(pa.int8(), pa.string()),
        "hash": pa.uint64(),
        "punsafe": pa.float16(),
        "license": pa.null(),
    },
}
VALUES: dict[str, Any] = {"url": "http://a.org/1.jpg", "text": "a cat", "caption": "a cat", "width": 640, "height": 480}


def value(name: str, type: pa.DataType) -> Any:
    if name.lower() in VALUES:
        return VALUES[name.lower()]
    if pa.types.is_null(type):
        return None
    if pa.types.is_integer(type):
        return 7
    return 0.25 if pa.types.is_floating(type) else "x"


def read(file: Path, schema_name: str) -> tuple[FileColumns, dict[str, pa.Array]]:
    found = find_columns("data.sources.x", schema_name, file)
    batch = pq.read_table(file, columns=found.names()).combine_chunks().to_batches()[0]
    return found, read_columns(batch, found, SCHEMAS[schema_name].columns)


@pytest.mark.parametrize("variant", LAION_VARIANTS)
def test_laion_in_all_its_variants(tmp_path: Path, variant: str) -> None:
    types = LAION_VARIANTS[variant]
    table = pa.table({name: pa.array([value(name, each), None], each) for name, each in types.items()})
    pq.write_table(table, tmp_path / "a.parquet")
    found, columns = read(tmp_path / "a.parquet", "laion2b_en")
    assert "__index_level_0__" not in found.names()
    assert columns["url"].to_pylist() == ["http://a.org/1.jpg", None]
    assert columns["caption"].to_pylist() == ["a cat", None]
    lower = {name.lower(): each for name, each in types.items()}
    published = {"metadata_width": "width", "metadata_height": "height"}
    if "aesthetic_score" in lower:
        published["aesthetic"] = "aesthetic_score"
    for column in SCHEMAS["laion2b_en"].columns:
        name = published.get(column.name, column.name)
        expected = value(name, lower[name]) if name in lower else None
        assert columns[column.name].type == column.type
        assert columns[column.name].to_pylist() == [expected, None], column.name


def test_coyo_and_a_table_of_ones_own(tmp_path: Path) -> None:
    coyo = {"id": [5], "url": ["http://a.org/1"], "text": ["a dog"], "width": [640], "height": [480]}
    coyo |= {"image_phash": ["c3" * 8], "clip_similarity_vitb32": [0.5], "clip_similarity_vitl14": [0.25]}
    coyo |= {"nsfw_score_opennsfw2": [0.5], "nsfw_score_gantman": [0.5], "watermark_score": [0.5]}
    pq.write_table(pa.table({**coyo, "aesthetic_score_laion_v2": [5.0], "num_faces": [1]}), tmp_path / "coyo.parquet")
    _, columns = read(tmp_path / "coyo.parquet", "coyo700m")
    assert columns["image_phash"].to_pylist() == ["c3" * 8]
    assert columns["metadata_height"].to_pylist() == [480]
    assert columns["aesthetic_score_laion_v2"].to_pylist() == [5.0]
    pq.write_table(pa.table({"Image_URL": ["http://a.org/2"], "alt_text": ["a bird"]}), tmp_path / "own.parquet")
    found, columns = read(tmp_path / "own.parquet", "table")
    assert found == FileColumns("Image_URL", "alt_text", {})
    assert columns["caption"].to_pylist() == ["a bird"]
    assert {name for name, values in columns.items() if values.null_count == 0} == {"url", "caption"}


def test_no_kept_column_has_a_name_that_the_download_writes() -> None:
    taken = {"url", "caption", "key", "status", "error_message", "width", "height", "original_width"}
    taken |= {"original_height", "exif", "sha256"}
    for schema in SCHEMAS.values():
        names = [column.name for column in schema.columns]
        assert not taken & set(names)
        assert len(set(names)) == len(names)
        assert {name for role in schema.roles.values() for name in role} <= set(names)


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    table = pa.table(
        {
            "URL": ["http://a.org"] * 4,
            "TEXT": ["a"] * 4,
            "WIDTH": pa.array([float("nan"), float("inf"), 3e12, 640.0]),
            "HEIGHT": pa.array([-1, 1 << 40, None, 480], pa.int64()),
            "punsafe": pa.array([float("nan"), None, 0.5, 1.0]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    _, columns = read(tmp_path / "a.parquet", "laion2b_en")
    assert columns["metadata_width"].to_pylist() == [None, None, None, 640]
    assert columns["metadata_height"].to_pylist() == [None, None, None, 480]
    assert columns["punsafe"].to_pylist() == [None, None, 0.5, 1.0]


def test_text_that_is_no_utf8_is_read_with_marks(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [b"http://a.org/\xff", None], "text": [b"caf\xe9", b"ok"]}), tmp_path / "a.parquet")
    _, columns = read(tmp_path / "a.parquet", "coyo700m")
    assert columns["url"].to_pylist() == ["http://a.org/\ufffd", None]
    assert columns["caption"].to_pylist() == ["caf\ufffd", "ok"]


URLS = ["http://a.org/1", None]
TYPED: dict[str, tuple[pa.Array, list[Any]]] = {
    "string_view": (pa.array(URLS, pa.string_view()), URLS),
    "binary_view": (pa.array([b"http://a.org/1", None], pa.binary_view()), URLS),
    "large_string": (pa.array(URLS, pa.large_string()), URLS),
    "large_binary": (pa.array([b"http://a.org/1", None], pa.large_binary()), URLS),
    "dictionary of large_string": (pa.array(URLS, pa.large_string()).dictionary_encode(), URLS),
    "dictionary of binary": (pa.array([b"http://a.org/1", None]).dictionary_encode(), URLS),
}
LARGE = 2**64 - 3
MOST = 2**53
NUMBERS: dict[str, tuple[pa.Array, list[Any], list[Any], list[Any]]] = {
    # As a hash, a width and a score.
    "uint64": (pa.array([LARGE, 7], pa.uint64()), [-3, 7], [None, 7], [float(LARGE), 7.0]),
    "int64": (pa.array([-3, None]), [-3, None], [None, None], [-3.0, None]),
    "decimal": (pa.array([Decimal(LARGE), Decimal(7)]), [-3, 7], [None, 7], [float(LARGE), 7.0]),
    "decimal beyond 64 bits": (pa.array([Decimal(10) ** 30, None]), [None, None], [None, None], [1e30, None]),
    "decimal with a fraction": (pa.array([Decimal("0.25"), Decimal("-1")]), [0, -1], [0, None], [0.25, -1.0]),
    "bool": (pa.array([True, None]), [1, None], [1, None], [1.0, None]),
    "float": (pa.array([MOST + 2.0, -7.0]), [None, -7], [None, None], [MOST + 2.0, -7.0]),
    "not finite": (pa.array([float("inf"), float("nan")]), [None] * 2, [None] * 2, [None] * 2),
    "beyond float32": (pa.array([1e300, -1e300]), [None] * 2, [None] * 2, [None] * 2),
    "float16": (pa.array([0.5, None], pa.float16()), [0, None], [0, None], [0.5, None]),
    "dictionary": (pa.array([Decimal("0.5"), None]).dictionary_encode(), [0, None], [0, None], [0.5, None]),
    "null": (pa.nulls(2), [None] * 2, [None] * 2, [None] * 2),
}


@pytest.mark.parametrize("name", TYPED)
def test_text_of_every_type(tmp_path: Path, name: str) -> None:
    values, expected = TYPED[name]
    pq.write_table(pa.table({"url": values, "caption": values}), tmp_path / "a.parquet")
    _, columns = read(tmp_path / "a.parquet", "table")
    assert columns["url"].to_pylist() == columns["caption"].to_pylist() == expected


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_every_type(tmp_path: Path, name: str) -> None:
    values, hashes, sizes, scores = NUMBERS[name]
    columns = {"url": ["u"] * 2, "caption": ["c"] * 2, "hash": values, "width": values, "punsafe": values}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    _, found = read(tmp_path / "a.parquet", "table")
    assert found["hash"].to_pylist() == hashes
    assert found["metadata_width"].to_pylist() == sizes
    assert found["punsafe"].to_pylist() == pa.array(scores, pa.float32()).to_pylist()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"url": ["x"]},
            r"has no caption column \(text or caption\), only url; give metadata of the schema laion2b_en",
        ),
        ({"TEXT": ["x"], "WIDTH": [1]}, r"has no URL column \(url\), only TEXT, WIDTH"),
        ({"url": ["x"], "URL": ["x"], "text": ["x"]}, "has url and URL; leave one of them"),
        ({"url": [1], "text": ["x"]}, "column url is of type int64, text expected"),
        ({"url": ["x"], "text": ["x"], "punsafe": ["0.5"]}, "column punsafe is of type string, numbers expected"),
        (
            {"url": ["x"], "text": ["x"], "width": [1], "WIDTH": [2]},
            "has width and WIDTH; leave one of them, or name one",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, table: dict[str, list[Any]], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"data\.sources\.x\.metadata: .*a\.parquet.*" + message):
        find_columns("data.sources.x", "laion2b_en", tmp_path / "a.parquet")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.x\.metadata=.*: no parquet file there"):
        metadata_files("data.sources.x.metadata", str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read as parquet"):
        find_columns("data.sources.x", "table", tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"data\.sources\.x\.schema=laion: unknown; choose one of laion2b_en"):
        find_columns("data.sources.x", "laion", tmp_path / "a.parquet")
