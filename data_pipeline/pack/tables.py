"""Images with their captions, as tables name them: CSV, TSV, JSON lines, a JSON list, parquet, and COCO's captions.

An entry is an image with its caption, whatever names it; what is left out is counted.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vdtrain.config.data_schema import PackConfig
from vdtrain.errors import ConfigError, not_utf8, one_line, unreadable

NO_CAPTION = "no caption"
MISSING = "missing file"
ADDRESS = "an address, not a file"
NO_PATH = "no path"

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """An image file and its caption."""

    image: str  # path relative to the folder of the images, if the image is below it
    caption: str | None  # the text; None if it stands in a file
    caption_file: str | None  # path of that file, as `image`
    stamp: str  # sizes and times of the files, by which a later run recognises a changed file
    references: tuple[str, ...] = ()  # all captions of the image, if it has several


class LeftOut:
    """Counts what is left out by reason, with the first example of each."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        self.reasons[reason] += 1
        self.examples.setdefault(reason, example)

    def __str__(self) -> str:
        return (
            ", ".join(f"{count:,} {reason} ({self.examples[reason]})" for reason, count in self.reasons.most_common())
            or "none"
        )


def captioned(place: str, caption: Any, captions: str, folder: Path, base: Path, left_out: LeftOut) -> Iterator[Entry]:
    """The entries of an image that a table names: one for each of its captions that is taken, or a count.

    Args:
        place: the image's path, absolute or relative to `folder`.
        caption: a text, or a list of texts.
        captions: the setting `data.pack.captions`.
        base: the folder that the path of the entry is relative to.
    """
    name = place.strip()
    if not name:
        left_out.add(NO_PATH, repr(caption))
        return
    name = name.removeprefix("file://")
    if _ADDRESS.match(name):
        left_out.add(ADDRESS, name)
        return
    texts = [text for text in map(clean, caption if isinstance(caption, list) else [caption]) if text]
    if not texts:
        left_out.add(NO_CAPTION, name)
        return
    # Tables made on Windows separate folders by backslashes.
    for path in (os.path.join(folder, each) for each in (name, name.replace("\\", "/"))):
        if (stamp := stamp_of(path)) is not None:
            break
    else:
        left_out.add(MISSING, name)
        return
    references = tuple(texts) if len(texts) > 1 else ()
    for text in texts if captions == "each" else texts[:1]:
        yield Entry(relative(path, base), text, None, stamp, references)


def clean(caption: Any) -> str:
    """A caption on one line; empty if it is not a text."""
    if caption is None or isinstance(caption, dict | float):
        return ""
    # JSON can hold unpaired surrogates, which UTF-8 cannot.
    return " ".join(str(caption).encode("utf-8", "replace").decode().split())


def stamp_of(*paths: str) -> str | None:
    """Sizes and modification times of files; None if one of them is not there or not a file."""
    stamps = []
    for path in paths:
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        stamps.append(f"{found.st_size} {found.st_mtime_ns}")
    return " ".join(stamps)


def relative(path: str, base: Path) -> str:
    """A path relative to `base` if it is below it, otherwise absolute."""
    found = os.path.relpath(path, base)
    return os.path.abspath(path) if found.split(os.sep)[0] == os.pardir else found


# Names that published tables use, in lower case; the first that a table has is taken.
FILE_NAME = ("file_name", "image_file_name")
IMAGE = (
    *FILE_NAME,
    *("image_path", "img_path", "filepath", "file_path", "path", "filename", "image_name", "image_file", "file"),
    *("image", "img"),
)
CAPTION = (
    *("text", "caption", "captions", "caption_text", "prompt", "description", "title", "comment", "alt_text"),
    *("sentence", "sentences", "raw"),
)
SEPARATORS = ("\t", ",", ";", "|")
SHORT, NOT_JSON = "row without image or caption column", "line that is not a JSON object"
ROWS = 1000

Row = tuple[Any, Any]


def table_entries(
    table: Path, folder: Path, base: Path, config: PackConfig, left_out: LeftOut, images: Sequence[str] = IMAGE
) -> Iterator[Entry]:
    """The images that a table names, in its order.

    Args:
        folder: that paths in the table are relative to.
        base: that paths of the entries are relative to.
        images: the names that the column of image paths may have.

    Raises:
        ConfigError: the table cannot be read, or a column is missing.
    """
    try:
        for image, caption in _rows(table, config, left_out, images):
            if isinstance(image, dict | bytes):
                raise ConfigError(
                    f"data.pack.input={table}: holds the images themselves and not their paths; write them to a folder"
                )
            yield from captioned(str(image or ""), caption, config.captions, folder, base, left_out)
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.pack.input={table}: {not_utf8(error, table)}") from error
    except OSError as error:
        raise ConfigError(f"data.pack.input={table}: {unreadable(error, table)}") from error
    except (csv.Error, json.JSONDecodeError, pa.ArrowException) as error:
        raise ConfigError(f"data.pack.input={table}: cannot be read ({one_line(error)}); give another file") from error


def _rows(table: Path, config: PackConfig, left_out: LeftOut, images: Sequence[str]) -> Iterator[Row]:
    form = table.suffix.lower()
    reader = READERS.get(form)
    if reader is None:
        raise ConfigError(
            f"data.pack.input={table}: neither a folder nor one of {' '.join(READERS)}; give one of these"
        )

    def find(names: Sequence[str]) -> tuple[str, str]:
        """The names of the two columns."""
        return (
            _column(table, "image paths", "image_column", config.image_column, images, names),
            _column(table, "captions", "caption_column", config.caption_column, CAPTION, names),
        )

    return reader(table, find, left_out)


Find = Callable[[Sequence[str]], tuple[str, str]]


def _csv(table: Path, find: Find, left_out: LeftOut) -> Iterator[Row]:
    with table.open("rb") as probe:
        wide = probe.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    with table.open(encoding="utf-16" if wide else "utf-8-sig", newline="") as file:
        head = file.readline()
        counts = {separator: head.count(separator) for separator in SEPARATORS}
        separator = max(SEPARATORS, key=counts.__getitem__)
        csv.field_size_limit(1 << 27)
        names = [name.strip() for name in next(csv.reader([head], delimiter=separator), [])]
        places = [names.index(name) for name in find(names)]
        for number, row in enumerate(csv.reader(file, delimiter=separator), start=2):
            if len(row) > max(places):
                yield row[places[0]], row[places[1]]
            elif row:
                left_out.add(SHORT, f"row {number}")


def _json_lines(table: Path, find: Find, left_out: LeftOut) -> Iterator[Row]:
    with table.open(encoding="utf-8-sig") as file:
        yield from _objects(_parsed(file, left_out), find, left_out)


def _parsed(lines: Iterator[str], left_out: LeftOut) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                left_out.add(NOT_JSON, f"line {number}")


def _json(table: Path, find: Find, left_out: LeftOut) -> Iterator[Row]:
    with table.open(encoding="utf-8-sig") as file:
        rows = json.load(file)
    if not isinstance(rows, list):
        raise ConfigError(
            f"data.pack.input={table}: neither a list of objects nor COCO's captions (images and annotations); give "
            "such a file"
        )
    return _objects(iter(rows), find, left_out)


def _objects(rows: Iterator[Any], find: Find, left_out: LeftOut) -> Iterator[Row]:
    """Two values of each object. The first object tells their names."""
    names: tuple[str, str] | None = None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            left_out.add(NOT_JSON, f"object {number}")
            continue
        names = names or find(list(row))
        yield row.get(names[0]), row.get(names[1])


def _parquet(table: Path, find: Find, left_out: LeftOut) -> Iterator[Row]:
    with pq.ParquetFile(table, pre_buffer=False) as parquet:
        names = find(parquet.schema_arrow.names)
        for batch in parquet.iter_batches(ROWS, columns=list(dict.fromkeys(names)), use_threads=False):
            yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)


READERS: dict[str, Callable[[Path, Find, LeftOut], Iterator[Row]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}


def _column(table: Path, what: str, setting: str, given: str | None, usual: Sequence[str], names: Sequence[str]) -> str:
    """The name of a column: the one that is given, or the first usual name; letters may be of any case."""
    spelt = {name.lower(): name for name in reversed(names)}
    if given is not None and given in names:
        return given
    for name in [given.lower()] if given is not None else usual:
        if name in spelt:
            return spelt[name]
    missing = f"no column {given}" if given is not None else f"no known column of {what}"
    raise ConfigError(
        f"data.pack.input={table}: {missing}, only {', '.join(names) or 'an empty first line'}; name it by "
        f"data.pack.{setting}"
    )


def coco_document(table: Path) -> dict[str, Any] | None:
    """The content of a file of COCO's captions, None of another JSON; a ConfigError for other annotations of COCO."""
    try:
        with table.open("rb") as file:
            # A list of objects is read as a table.
            if file.read(64).lstrip(codecs.BOM_UTF8).lstrip()[:1] != b"{":
                return None
        document = json.loads(table.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"data.pack.input={table}: {unreadable(error, table)}") from error
    except ValueError as error:
        raise ConfigError(f"data.pack.input={table}: cannot be read ({one_line(error)}); give another file") from error
    if not all(isinstance(document.get(part), list) for part in ("images", "annotations")):
        return None
    if not any("caption" in each for each in document["annotations"]):
        raise ConfigError(f"data.pack.input={table}: its annotations have no captions; give captions_*.json")
    return dict(document)


def coco_folder(table: Path, document: dict[str, Any], config: PackConfig) -> Path:
    """The folder of a COCO file's images: the given one, or the one where COCO's archives unpack to.

    Raises:
        ConfigError: the first image is in none of them.
    """
    if config.images is not None:
        return Path(config.images)
    split = table.stem.rpartition("_")[2]
    folders = [table.parent, table.parent / split, table.parent.parent / split, table.parent.parent / "images" / split]
    first = str(next((each.get("file_name") for each in document["images"]), ""))
    for folder in folders:
        if first and (folder / first).is_file():
            return folder
    raise ConfigError(
        f"data.pack.images=null: no {first} in {', '.join(map(str, folders))}; give the folder of the images"
    )


def coco_entries(document: dict[str, Any], folder: Path, config: PackConfig, left_out: LeftOut) -> Iterator[Entry]:
    """The images of a COCO captions file, in its order; an image's captions are ordered by their ids."""
    captions: dict[Any, list[tuple[Any, str]]] = {}
    for each in document["annotations"]:
        captions.setdefault(each.get("image_id"), []).append((each.get("id", 0), each.get("caption")))
    for image in document["images"]:
        texts = [text for _, text in sorted(captions.pop(image.get("id"), []), key=lambda each: each[0])]
        yield from captioned(str(image.get("file_name", "")), texts, config.captions, folder, folder, left_out)
    for number in captions:
        left_out.add("caption of no image", f"image_id {number}")
