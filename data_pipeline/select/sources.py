"""Published metadata sets: one schema per set, for all names and types under which its columns are published."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.select.metadata_files import CONVERT, metadata_files, partition
from vdtrain.config.data_schema import SourceConfig
from vdtrain.data.manifest import READ_ERRORS
from vdtrain.errors import ConfigError, one_line, system_error, unreadable

URL = "url"
CAPTION = "caption"
STATUS = "metadata_status"
# Before a name of ours that img2dataset would take, too.
PREFIX = "metadata_"
READ_BYTES = 1 << 20
PARQUET_MAGIC, ENCRYPTED_MAGIC = b"PAR1", b"PARE"
_is = pa.types
TEXTS = (_is.is_string, _is.is_large_string, _is.is_string_view, _is.is_binary, _is.is_large_binary, _is.is_binary_view)
NUMBERS = (_is.is_integer, _is.is_floating, _is.is_decimal, _is.is_boolean)


@dataclass(frozen=True)
class Column:
    """A column that is kept beside each pair, under a name that is not that of a column that img2dataset writes.

    Those are url, caption, key, status, error_message, width, height, original_width, original_height, exif, sha256.
    """

    name: str
    type: pa.DataType
    aliases: tuple[str, ...] = ()  # other published names, in lower case; the first that a file has is read
    stored: bool = True  # whether the selected parts have it; the filters read the others

    @property
    def names(self) -> tuple[str, ...]:
        """All names that are looked for."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class Schema:
    """One metadata set. The case of names does not matter."""

    columns: tuple[Column, ...]  # that are kept, if a file has them
    roles: Mapping[str, tuple[str, ...]]  # the columns that each filter reads; a limit holds for all of them
    url: tuple[str, ...] = ("url",)  # published names of the two columns that every row needs
    caption: tuple[str, ...] = ("text", "caption")


# Where img2dataset has been at work, `width` is that of the resized picture, and null where the download failed.
WIDTH = Column("metadata_width", pa.int32(), ("original_width", "width"))
HEIGHT = Column("metadata_height", pa.int32(), ("original_height", "height"))
SIZE = (WIDTH, HEIGHT, Column(STATUS, pa.string(), ("status",), stored=False))
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
    # DataComp's pools and baselines. `face_bboxes` is not read: nothing here blurs faces.
    "datacomp": Schema(
        columns=(
            Column("datacomp_uid", pa.string(), ("uid",)),
            Column("clip_b32_similarity_score", pa.float32()),
            Column("clip_l14_similarity_score", pa.float32()),
            Column("metadata_sha256", pa.string(), ("sha256",)),
            *SIZE,
        ),
        roles={"similarity": ("clip_b32_similarity_score",)},
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
    """The names of the columns of one metadata file."""

    url: str
    caption: str
    kept: Mapping[str, str]  # names in the file by the names in the schema

    def names(self) -> list[str]:
        """The columns that must be read from the file."""
        return [self.url, self.caption, *self.kept.values()]


@dataclass(frozen=True)
class MetadataFile:
    """One file of a source."""

    number: int  # of the file among the files of all sources
    source: str
    path: Path
    columns: FileColumns
    partition: Mapping[str, str | None]  # the columns that the names of its folders give

    def batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        """The columns that select needs, in batches of `rows` rows; a ConfigError if the file is damaged."""
        names = dict.fromkeys(self.columns.names())
        given = {name: pa.scalar(self.partition[name], pa.string()) for name in names if name in self.partition}
        try:
            # Without a buffer size, pyarrow holds a whole column of a row group, and a row group can be a whole file.
            with pq.ParquetFile(self.path, buffer_size=READ_BYTES, pre_buffer=False) as parquet:
                stored = [name for name in names if name not in given]
                for batch in parquet.iter_batches(rows, columns=stored, use_threads=False):
                    for name, value in given.items():
                        batch = batch.append_column(name, pa.repeat(value, len(batch)))
                    yield batch
        except READ_ERRORS as error:
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
        return tuple(column for column in self.schema.columns if column.stored and column.name in present)

    @property
    def image_hash(self) -> str | None:
        """The column with the images' perceptual hashes."""
        names = {column.name for column in self.columns}
        return next((name for name in self.schema.roles.get("phash", ()) if name in names), None)


def open_sources(configs: Mapping[str, SourceConfig], left_out: Collection[Path]) -> list[Source]:
    """Find the files and columns of all sources. Files are numbered over all sources.

    Args:
        left_out: folders that hold no metadata.

    Raises:
        ConfigError: a file is missing, damaged or of another schema.
    """
    sources: list[Source] = []
    number = 0
    for name, config in configs.items():
        setting = f"data.sources.{name}"
        files = []
        for path in metadata_files(f"{setting}.metadata", config.metadata, left_out, announce=True):
            folders = partition(config.metadata, path)
            found = find_columns(setting, config.schema, path, config.columns, folders)
            files.append(MetadataFile(number, name, path, found, folders))
            number += 1
        sources.append(Source(name, schema_of(setting, config.schema), tuple(files)))
    return sources


def schema_of(setting: str, name: str) -> Schema:
    """The schema of a name in the configuration; a ConfigError if none has that name."""
    if name not in SCHEMAS:
        raise ConfigError(f"{setting}.schema={name}: unknown; choose one of {', '.join(SCHEMAS)}")
    return SCHEMAS[name]


def check_columns(setting: str, config: SourceConfig) -> None:
    """Raise a ConfigError, with the nearest names, for columns that the schema does not have."""
    known = [URL, CAPTION, *(_role(column) for column in schema_of(setting, config.schema).columns)]
    for role, name in dict[str, Any](config.columns).items():
        if not isinstance(name, str | None):
            raise ConfigError(f"{setting}.columns.{role}={name}: must be the name of a column, or null")
        if role not in known:
            raise ConfigError(
                f"{setting}.columns.{role}={name}: the schema {config.schema} has no such column"
                f"{_nearest(role, known)}; choose from {', '.join(known)}"
            )


def find_columns(
    setting: str,
    schema_name: str,
    file: Path,
    given: Mapping[str, str | None] | None = None,
    folders: Mapping[str, str | None] | None = None,
) -> FileColumns:
    """Find a set's columns in one of its files. The files of one set may differ.

    Args:
        given: the names of columns in the file by their roles; None for a column that is not to be read.
        folders: the columns that the names of the file's folders give.

    Raises:
        ConfigError: the schema is unknown, the file is not parquet, the URL or caption column is missing, two columns
            have one name, or a column has a wrong type.
    """
    schema, given, folders = schema_of(setting, schema_name), given or {}, folders or {}
    place = f"{setting}.metadata: {file}"
    try:
        fields = list(pq.read_schema(file))
    except READ_ERRORS as error:
        raise _unreadable(place, file, error) from error
    there = {each.name for each in fields}
    fields += [pa.field(name, pa.string()) for name in folders if name not in there]
    spelt: dict[str, list[pa.Field]] = {}
    for each in fields:
        spelt.setdefault(each.name.lower(), []).append(each)

    def find(role: str, names: Sequence[str], type: pa.DataType, needed: bool = True) -> str | None:
        found = next((spelt[name] for name in names if name in spelt), [])
        if role in given:
            name = given[role]
            if name is None:
                return None
            found = [each for each in fields if each.name == name] or spelt.get(name.lower(), [])
            if not found:
                raise ConfigError(
                    f"{setting}.columns.{role}={name}: {file} has no such column{_nearest(name, there)}; it has "
                    f"{_names(fields)}"
                )
        if not found or not (needed or role in given or _fits(found[0].type, type)):
            return None
        if len(found) > 1:
            choice = f", or name one by {setting}.columns={{{role}: {found[-1].name}}}"
            raise ConfigError(
                f"{place} has {' and '.join(each.name for each in found)}; leave one of them"
                f"{choice if len({each.name for each in found}) > 1 else ''}"
            )
        (column,) = found
        if column.name in there or not pa.types.is_string(column.type):
            problem = None if _fits(column.type, type) else f"is of type {column.type}"
        else:
            problem = _folder_problem(folders[column.name], type)
        if problem:
            kind = "text" if pa.types.is_string(type) else "numbers"
            raise ConfigError(
                f"{place}: column {column.name} {problem}, {kind} expected; convert or drop it, or name another by "
                f"{setting}.columns={{{role}: NAME}}"
            )
        return str(column.name)

    def need(role: str, names: Sequence[str]) -> str:
        found = find(role, names, pa.string())
        if found is None:
            raise ConfigError(
                f"{place} has no {'URL' if role == URL else role} column ({' or '.join(names)}), only "
                f"{_names(fields)}; give metadata of the schema {schema_name}, or name the column by "
                f"{setting}.columns={{{role}: NAME}}"
            )
        return found

    # Width and height are of the same picture: the first pair that is complete.
    pairs = [pair for pair in zip(WIDTH.names, HEIGHT.names, strict=True) if all(name in spelt for name in pair)]
    sizes = dict(zip((WIDTH, HEIGHT), pairs[0], strict=True)) if pairs else {}
    url, caption, kept = need(URL, schema.url), need(CAPTION, schema.caption), {}
    for column in schema.columns:
        names = (sizes[column],) if column in sizes else column.names
        if found := find(_role(column), names, column.type, column.stored):
            kept[column.name] = found
    return FileColumns(url, caption, kept)


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


def _role(column: Column) -> str:
    """The name of a column in the setting `columns`."""
    return column.name.removeprefix(PREFIX)


def _names(fields: Sequence[pa.Field]) -> str:
    return ", ".join(each.name for each in fields) or "no columns"


def _nearest(name: str, known: Collection[str]) -> str:
    lower = {each.lower(): each for each in known}
    close = [lower[each] for each in difflib.get_close_matches(name.lower(), lower)]
    return f" (nearest: {', '.join(close)})" if close else ""


def _unreadable(place: str, file: Path, error: Exception) -> ConfigError:
    found = system_error(error)
    if found is not None and found.errno is not None:
        return ConfigError(f"{place} {unreadable(found, file, 'fetch it again')}")
    with file.open("rb") as opened:
        magic = opened.read(len(PARQUET_MAGIC))
    if magic == ENCRYPTED_MAGIC or "crypt" in str(error):
        remedy = "it is encrypted: decrypt it"
    elif isinstance(error, NotImplementedError):
        remedy = f"pyarrow {pa.__version__} does not know its format: write it again with an older version of parquet"
    elif magic and magic != PARQUET_MAGIC:
        remedy = f"{CONVERT}, or fetch it again"
    else:
        remedy = "fetch it again, or remove it"
    return ConfigError(f"{place} cannot be read as parquet ({one_line(error)}); {remedy}")


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column of one type is read as another: text, or numbers."""
    actual = found.value_type if pa.types.is_dictionary(found) else found
    tests = TEXTS if pa.types.is_string(wanted) else NUMBERS
    return pa.types.is_null(actual) or any(test(actual) for test in tests)


def _folder_problem(value: str | None, wanted: pa.DataType) -> str | None:
    try:
        pa.array([value], pa.string()).cast(wanted)
    except pa.ArrowInvalid:
        return f"is {value!r} in a folder's name"
    return None


def _plain(values: pa.Array) -> pa.Array:
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _text(values: pa.Array) -> pa.Array:
    """Strings. Bytes that are not UTF-8 become the replacement character."""
    values = _plain(values)
    if pa.types.is_null(values.type):
        return values.cast(pa.string())
    binary = values.cast(pa.binary())
    try:
        return binary.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([each if each is None else each.decode(errors="replace") for each in binary.to_pylist()])


def _numbers(values: pa.Array, type: pa.DataType) -> pa.Array:
    values = _plain(values)
    if pa.types.is_string(values.type):
        values = values.cast(type)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    if pa.types.is_decimal(values.type) and type.bit_width == 64:
        return pa.array([_signed(each) for each in values.to_pylist()], type)
    if pa.types.is_decimal(values.type):
        values = values.cast(pa.float64())
    if not pa.types.is_floating(values.type):
        if pa.types.is_integer(type) and type.bit_width < 64 and pa.types.is_integer(values.type):
            values = values.cast(pa.int64(), safe=False)
            fits = pc.and_(pc.greater_equal(values, 0), pc.less(values, 1 << (type.bit_width - 1)))
            values = pc.if_else(fits, values, pa.scalar(None, values.type))
        # An unsigned 64-bit hash keeps its bits.
        return values.cast(type, safe=False)
    if pa.types.is_floating(type):
        numbers = values.cast(type, safe=False)
        return pc.if_else(pc.is_finite(numbers), numbers, pa.scalar(None, type)) if len(numbers) else numbers
    exact = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    # Above 2^53 the digits of a hash are lost: no hash is better than a wrong one.
    whole = np.isfinite(exact) & (np.abs(exact) <= 2.0**53)
    if type.bit_width < 64:
        whole &= (exact >= 0) & (exact < 2.0 ** (type.bit_width - 1))
    return pa.array(np.where(whole, exact, 0).astype(type.to_pandas_dtype()), type, mask=~whole)


def _signed(number: Decimal | None) -> int | None:
    """The signed number of the same 64 bits; None beyond them."""
    if number is None or not -(1 << 63) <= number < 1 << 64:
        return None
    return int(number) - (1 << 64) * (number >= 1 << 63)
