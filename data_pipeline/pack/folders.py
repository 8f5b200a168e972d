"""A folder of images: each has a caption in a file beside it, or all have them in one `metadata` file above them.

The second is the layout of Hugging Face's imagefolder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.pack.tables import FILE_NAME, MISSING, NO_CAPTION, Entry, LeftOut, relative, stamp_of, table_entries
from vdtrain.config.data_schema import PackConfig
from vdtrain.data.tar_samples import IMAGES
from vdtrain.errors import ConfigError, unreadable

EXTENSIONS = {f".{extension}" for extension in (*IMAGES, "jpe")}
# The first of several is taken.
CAPTIONS = (".txt", ".caption")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
UNNAMED = "not named in the metadata file"
LONELY = "caption without an image"


def folder_entries(top: Path, config: PackConfig, left_out: LeftOut) -> Iterator[Entry]:
    """The images below a folder, by path; hidden files are passed over.

    Raises:
        ConfigError: a metadata file cannot be read, or a folder has two.
    """
    named: set[str] = set()
    described: list[str] = []
    for folder, names in walk(top):
        tables = [name for name in names if name.lower() in METADATA]
        if len(tables) > 1:
            raise ConfigError(
                f"data.pack.input={top}: {folder} has {' and '.join(tables)}; give one of them as data.pack.input"
            )
        for name in tables:
            described.append(os.path.join(folder, ""))
            for entry in table_entries(Path(folder, name), Path(folder), top, config, left_out, FILE_NAME):
                named.add(os.path.normpath(os.path.join(top, entry.image)))
                yield entry
        images = [name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
        if any(os.path.join(folder, "").startswith(each) for each in described):
            for name in images:
                path = os.path.join(folder, name)
                if os.path.normpath(path) not in named:
                    left_out.add(UNNAMED, relative(path, top))
            continue
        yield from _beside(top, folder, images, names, left_out)


def _beside(top: Path, folder: str, images: Sequence[str], names: Sequence[str], left_out: LeftOut) -> Iterator[Entry]:
    """The images of one folder with the captions in the files beside them: a.txt or a.jpg.txt for a.jpg."""
    captions: dict[str, str] = {}
    for suffix in reversed(CAPTIONS):
        captions |= {stem: name for name in names for stem, end in [os.path.splitext(name)] if end.lower() == suffix}
    used = set()
    for image in images:
        path = os.path.join(folder, image)
        beside = captions.get(os.path.splitext(image)[0]) or captions.get(image)
        if beside is None:
            left_out.add(NO_CAPTION, relative(path, top))
            continue
        used.add(beside)
        caption = os.path.join(folder, beside)
        stamp = stamp_of(path, caption)
        if stamp is None:
            left_out.add(MISSING, relative(path, top))
            continue
        yield Entry(relative(path, top), None, relative(caption, top), stamp)
    for name in sorted(set(captions.values()) - used):
        left_out.add(LONELY, relative(os.path.join(folder, name), top))


def walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder below `top` with the names of its files, in order; links are followed, and no folder comes twice."""
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(top, followlinks=True, onerror=_refuse):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        # What macOS adds to archives has the names of images.
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield folder, sorted(name for name in names if not name.startswith("."))


def _refuse(error: OSError) -> None:
    folder = Path(str(error.filename))
    raise ConfigError(f"data.pack.input: {folder}: {unreadable(error, folder, 'give another folder')}") from error
