"""Published metadata sets: one schema per set, for all names and types under which its columns are published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vdtrain.config.compose import ConfigError
from vdtrain.config.data_schema import SourceConfig
from vdtrain.errors import one_line, system_error, unreadable

URL = "url"
CAPTION = "caption"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Column:
    """A column that is kept beside each pair.

    Attributes:
        name: in the selected parts. It must not be the name of a column that img2dataset writes: url, caption, key,
            status, error_message, width, height, original_width, original_height, exif, sha256.
        type: in the selected parts.
        aliases: other published names, in lower case.
    """

    name: str
    type: pa.DataType
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schema:
    """One metadata set. The case of names does not matter.

    Attributes:
        url, caption: published names of the two columns that every row needs.
        columns: the other columns that are kept, if a file has them.
        roles: the columns that each filter reads. A limit holds for all of them.
    """

    url: tuple[str, ...]
    caption: tuple[str, ...]
    columns: tuple[Column, ...]
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


SIZE = (Column("metadata_width", pa.int32(), ("width",)), Column("metadata_height", pa.int32(), ("height",)))
LAION_SCORES = (
    Column("similarity", pa.float32()),
    Column("punsafe", pa.float32()),
    Column("pwatermark", pa.float32()),
    Column("aesthetic", pa.float32(), ("aesthetic_score",)),
)
LAION_ROLES = {
    "similarity": ("similarity",),
    "nsfw": ("punsafe",),
    "nsfw_label": ("nsfw",),
    "watermark": ("pwatermark",),
    "aesthetic": ("aesthetic",),
    "hash": ("hash",),
    "md5": ("md5",),
}
SCHEMAS = {
    # laion2B-en, -joined, -aesthetic and -md5, and their re-issues; each has some of the columns.
    "laion2b_en": Schema(
        url=("url",),
        caption=("text", "caption"),
        columns=(
            Column("sample_id", pa.int64()),
            Column("license", pa.string()),
            Column("nsfw", pa.string()),
            Column("hash", pa.int64()),
            Column("md5", pa.string()),
            *LAION_SCORES,
            *SIZE,
        ),
        roles=LAION_ROLES,
    ),
    "coyo700m": Schema(
        url=("url",),
        caption=("text", "caption"),
        columns=(
            Column("id", pa.int64()),
            Column("image_phash", pa.string()),
            Column("clip_similarity_vitb32", pa.float32()),
            Column("clip_similarity_vitl14", pa.float32()),
            Column("nsfw_score_opennsfw2", pa.float32()),
            Column("nsfw_score_gantman", pa.float32()),
            Column("watermark_score", pa.float32()),
            Column("aesthetic_score_laion_v2", pa.float32()),
            *SIZE,
        ),
        roles={
            # LAION-2B-en was scored by this network. The similarities of ViT-L/14 are on another scale.
            "similarity": ("clip_similarity_vitb32",),
            "nsfw": ("nsfw_score_opennsfw2", "nsfw_score_gantman"),
            "watermark": ("watermark_score",),
            "aesthetic": ("aesthetic_score_laion_v2",),
            "phash": ("image_phash",),
        },
    ),
    # A user's own table: a URL and a caption, and any of the other columns.
    "table": Schema(
        url=("url", "image_url"),
        caption=("caption", "text", "alt_text"),
        columns=(
            Column("license", pa.string()),
            Column("nsfw", pa.string()),
            Column("hash", pa.int64()),
            Column("md5", pa.string()),
            Column("phash", pa.string(), ("image_phash",)),
            *LAION_SCORES,
            *SIZE,
        ),
        roles={**LAION_ROLES, "phash": ("phash",)},
    ),
}


@dataclass(frozen=True)
class FileColumns:
    """The names of the columns of one metadata file.

    Attributes:
        url, caption: their names in the file.
        kept: names in the file by the names in the schema.
    """

    url: str
    caption: str
    kept: Mapping[str, str]

    def names(self) -> list[str]:
        """The columns that must be read from the file."""
        return [self.url, self.caption, *self.kept.values()]


@dataclass(frozen=True)
class MetadataFile:
    """One file of a source.

    Attributes:
        number: of the file among the files of all sources.
    """

    number: int
    source: str
    path: Path
    columns: FileColumns

    def batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        """The columns that select needs, in batches of `rows` rows.

        Raises:
            ConfigError: the file is damaged.
        """
        names = list(dict.fromkeys(self.columns.names()))
        try:
            # Without a buffer size, pyarrow holds a whole column of a row group, and a row group can be a whole file.
            with pq.ParquetFile(self.path, buffer_size=READ_BYTES, pre_buffer=False) as parquet:
                yield from parquet.iter_batches(rows, columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(f"data.sources.{self.source}.metadata: {self.path}", self.path, error) from error


@dataclass(frozen=True)
class Source:
    """The metadata of a source."""

    name: str
    schema: Schema
    files: tuple[MetadataFile, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of the schema that at least one file has."""
        present = {name for file in self.files for name in file.columns.kept}
        return tuple(column for column in self.schema.columns if column.name in present)

    @property
    def image_hash(self) -> str | None:
        """The column with the images' perceptual hashes."""
        names = {column.name for column in self.columns}
        return next((name for name in self.schema.roles.get("phash", ()) if name in names), None)


def open_sources(configs: Mapping[str, SourceConfig]) -> list[Source]:
    """Find the files and columns of all sources. Files are numbered over all sources.

    Raises:
        ConfigError: a file is missing, damaged or of another schema.
    """
    sources: list[Source] = []
    number = 0
    for name, config in configs.items():
        setting = f"data.sources.{name}"
        files = []
        for path in metadata_files(f"{setting}.metadata", config.metadata):
            files.append(MetadataFile(number, name, path, find_columns(setting, config.schema, path)))
            number += 1
        sources.append(Source(name, schema_of(setting, config.schema), tuple(files)))
    return sources


def schema_of(setting: str, name: str) -> Schema:
    """The schema of a name in the configuration.

    Raises:
        ConfigError: no schema has that name.
    """
    if name not in SCHEMAS:
        raise ConfigError(f"{setting}.schema={name}: unknown; choose one of {', '.join(SCHEMAS)}")
    return SCHEMAS[name]


def metadata_files(setting: str, metadata: str) -> list[Path]:
    """The parquet files of a set, by name: one file, or all files of a folder.

    Raises:
        ConfigError: no parquet file is there.
    """
    path = Path(metadata)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] * path.is_file()
    if not files:
        raise ConfigError(f"{setting}={metadata}: no parquet file there; put the metadata there or give another path")
    return files


def find_columns(setting: str, schema_name: str, file: Path) -> FileColumns:
    """Find a set's columns in one of its files. The files of one set may differ.

    Raises:
        ConfigError: the schema is unknown, the file is not parquet, the URL or caption column is missing, two columns
            have one name, or a column has a wrong type.
    """
    schema = schema_of(setting, schema_name)
    place = f"{setting}.metadata: {file}"
    try:
        fields = list(pq.read_schema(file))
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(place, file, error) from error
    spelt: dict[str, list[pa.Field]] = {}
    for each in fields:
        spelt.setdefault(each.name.lower(), []).append(each)

    def find(names: Sequence[str], type: pa.DataType) -> str | None:
        for name in names:
            found = spelt.get(name, [])
            if len(found) > 1:
                raise ConfigError(f"{place} has {' and '.join(each.name for each in found)}; leave one of them")
            if found:
                _check_type(place, found[0], type)
                return str(found[0].name)
        return None

    def need(kind: str, names: Sequence[str]) -> str:
        found = find(names, pa.string())
        if found is None:
            raise ConfigError(
                f"{place} has no {kind} column ({' or '.join(names)}), only {', '.join(each.name for each in fields)}; "
                f"give metadata of the schema {schema_name}"
            )
        return found

    url, caption = need("URL", schema.url), need("caption", schema.caption)
    kept = {column.name: find((column.name, *column.aliases), column.type) for column in schema.columns}
    return FileColumns(url, caption, {name: found for name, found in kept.items() if found is not None})


def read_columns(batch: pa.RecordBatch, found: FileColumns, columns: Sequence[Column]) -> dict[str, pa.Array]:
    """A batch's columns by their names in the schema (url, caption and `columns`), in the types of the schema.

    A column that the file does not have is all null. NaN, and numbers that do not fit the type, become null.
    """
    read = {URL: _text(batch.column(found.url)), CAPTION: _text(batch.column(found.caption))}
    for column in columns:
        if column.name not in found.kept:
            read[column.name] = pa.nulls(len(batch), column.type)
            continue
        values = batch.column(found.kept[column.name])
        read[column.name] = _text(values) if pa.types.is_string(column.type) else _numbers(values, column.type)
    return read


def _unreadable(place: str, file: Path, error: Exception) -> ConfigError:
    found = system_error(error)
    if found is not None and found.errno is not None:
        return ConfigError(f"{place} {unreadable(found, file, 'fetch it again')}")
    return ConfigError(f"{place} cannot be read as parquet ({one_line(error)}); fetch it again")


def _check_type(place: str, found: pa.Field, wanted: pa.DataType) -> None:
    actual = found.type.value_type if pa.types.is_dictionary(found.type) else found.type
    text = any(
        test(actual) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_null)
    )
    number = pa.types.is_integer(actual) or pa.types.is_floating(actual) or pa.types.is_null(actual)
    if not (text if pa.types.is_string(wanted) else number):
        kind = "text" if pa.types.is_string(wanted) else "numbers"
        raise ConfigError(f"{place}: column {found.name} is of type {found.type}, {kind} expected; convert or drop it")


def _text(values: pa.Array) -> pa.Array:
    """Strings. Bytes that are not UTF-8 become the replacement character."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_null(values.type):
        return values.cast(pa.string())
    binary = values.cast(pa.binary())
    try:
        return binary.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([each if each is None else each.decode(errors="replace") for each in binary.to_pylist()])


def _numbers(values: pa.Array, type: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not pa.types.is_floating(values.type):
        if pa.types.is_integer(type) and type.bit_width < 64 and pa.types.is_integer(values.type):
            fits = pc.and_(pc.greater_equal(values, 0), pc.less(values, 1 << (type.bit_width - 1)))
            values = pc.if_else(fits, values, pa.scalar(None, values.type))
        # An unsigned 64-bit hash keeps its bits.
        return values.cast(type, safe=False)
    if pa.types.is_floating(type):
        numbers = values.cast(type, safe=False)
        return pc.if_else(pc.is_nan(numbers), pa.scalar(None, type), numbers) if len(numbers) else numbers
    exact = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    whole = np.isfinite(exact) & (np.abs(exact) < 2.0 ** (type.bit_width - 1))
    return pa.array(np.where(whole, exact, 0).astype(type.to_pandas_dtype()), type, mask=~whole)
