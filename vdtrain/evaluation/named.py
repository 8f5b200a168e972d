"""Texts by name, as people keep them: prompts of generated images, captions of images, COCO's files of both."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vdtrain.config.compose import ConfigError
from vdtrain.errors import not_utf8, one_line, unreadable

# Usual names of a table's columns, in small letters. The first that a table has is taken.
NAMES = ("file_name", "filename", "file", "image_path", "path", "image", "img", "name", "key", "image_id", "id")
PROMPTS = ("prompt", "caption", "text", "captions", "references", "prompts")
CAPTIONS = ("caption", "text", "captions", "references", "sentence", "prompt")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")

Row = tuple[str, str]


def read_texts(path: Path, setting: str, columns: Sequence[str] = CAPTIONS) -> list[Row]:
    """The rows (name, text) of a table; a name with several texts has several rows.

    It is one of: lines of JSON objects; a JSON list of objects, a table {name: text or texts}, COCO's captions or
    COCO's results; CSV or TSV with a first line of names; text with NAME, a tab and the text on each line. Lines of
    text without tabs have no names: each is ("", text).

    Args:
        columns: names that the column of texts may have.

    Raises:
        ConfigError: the file cannot be read, has another form, or an empty text.
    """
    place = f"{setting}={path}"
    try:
        rows = list(_rows(path, columns))
    except OSError as error:
        raise ConfigError(f"{place}: {unreadable(error, path)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: {not_utf8(error, path)}") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{place}: {one_line(error)}; give lines such as {EXAMPLE.format(columns[0])}") from error
    if not rows:
        raise ConfigError(f"{place}: is empty; give lines such as {EXAMPLE.format(columns[0])}")
    return rows


EXAMPLE = '{{"file_name": "0.png", "{}": "a red circle"}}'


def _rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    form, text = path.suffix.lower(), path.read_text(encoding="utf-8-sig")
    if form in (".jsonl", ".ndjson"):
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        return _objects([_parsed(line, f"line {number}") for number, line in lines], columns)
    if form == ".json":
        return _document(_parsed(text, "the file"), columns)
    if form in (".csv", ".tsv"):
        table = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if form == ".tsv" else ",", strict=True)
        return _objects(list(table), columns)
    if form == ".txt":
        kept = [line for line in text.splitlines() if line.strip()]
        named = all("\t" in line for line in kept)
        return iter([_row(*(line.partition("\t")[::2] if named else ("", line)), line) for line in kept])
    raise ValueError(f"is not one of {' '.join(SUFFIXES)}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({one_line(error)})") from error


def _document(document: Any, columns: Sequence[str]) -> Iterator[Row]:
    if isinstance(document, list):
        return _objects(document, columns)
    if not isinstance(document, dict):
        raise ValueError("is neither a list nor a table")
    images, annotations = document.get("images"), document.get("annotations")
    if isinstance(images, list) and isinstance(annotations, list):
        return _coco(images, annotations)
    return iter([_row(name, text, name) for name, texts in document.items() for text in _listed(texts)])


def _coco(images: list[Any], annotations: list[Any]) -> Iterator[Row]:
    """The captions of COCO's file by the names of its images; those of an image by their ids."""
    try:
        names = {image["id"]: str(image["file_name"]) for image in images}
        for each in sorted(annotations, key=lambda each: each.get("id", 0)):
            yield _row(names[each["image_id"]], each["caption"], each)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"has images and annotations, but not as COCO's captions ({error!r})") from error


def _objects(objects: Sequence[Any], columns: Sequence[str]) -> Iterator[Row]:
    keys: tuple[str, str] | None = None
    for number, each in enumerate(objects, 1):
        if not isinstance(each, dict):
            raise ValueError(f"row {number} is not a table of columns")
        keys = keys or (_column(each, NAMES, "name"), _column(each, columns, "text"))
        for text in _listed(each.get(keys[1])):
            yield _row(each.get(keys[0]), text, f"row {number}")


def _column(row: dict[Any, Any], usual: Sequence[str], what: str) -> str:
    spelt = {str(name).strip().lower(): name for name in reversed(list(row))}
    for name in usual:
        if name in spelt:
            found: str = spelt[name]
            return found
    raise ValueError(f"has no column of a {what} ({', '.join(map(str, row))}), such as {usual[0]}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _row(name: Any, text: Any, where: Any) -> Row:
    """A row with its text on one line."""
    if not isinstance(text, str) or not text.strip() or name is None or isinstance(name, dict | list):
        raise ValueError(f"{where}: has no name or no text")
    return str(name).strip(), " ".join(text.encode("utf-8", "replace").decode().split())


class Names:
    """Finds a name among others: to the letter, without its ending or its folder, or by the number of a COCO image."""

    def __init__(self, names: Iterable[str]) -> None:
        self._numbers: list[dict[str, int | None]] = [{} for _ in FORMS]
        for number, name in enumerate(names):
            for form, found in zip(FORMS, self._numbers, strict=True):
                key = form(name)
                # A form that several names have finds none of them.
                found[key] = None if key in found else number

    def find(self, name: str) -> int | None:
        """The number of a name; None if there is none, or more than one."""
        for form, found in zip(FORMS, self._numbers, strict=True):
            if (number := found.get(form(name))) is not None:
                return number
        return None


def stem(name: str) -> str:
    """A name without the ending of a picture's file."""
    bare, suffix = os.path.splitext(name)
    return bare if suffix.lower() in PICTURES else name


def _number(name: str) -> str:
    """ "42" for COCO_val2014_000000000042.jpg, 000000000042.jpg and 42; else the name itself."""
    found = re.fullmatch(r"(?:COCO_\w+_)?0*(\d+)", os.path.basename(stem(name)))
    return f"number {found[1]}" if found else name


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMS: tuple[Callable[[str], str], ...] = (
    os.path.normpath,
    stem,
    os.path.basename,
    lambda name: os.path.basename(stem(name)),
    _number,
)
