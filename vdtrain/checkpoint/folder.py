"""The checkpoints of a run folder, by names, sizes and records. Needs no PyTorch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdtrain.errors import PASSING, one_line, unreadable
from vdtrain.files import ABSENT, REPLACED, FileRecord, damage, read_record

# The newest format. 2 has convolutions' weights with channels last, 3 partitions of several processes at multiples of
# another number than 2. A checkpoint without them is still of an earlier format.
FORMAT = 3
CHECKPOINTS = "checkpoints"
INDEX_FILE, LATEST_FILE = "checkpoint.json", "latest"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be read; the message names it and the cause."""


class UnreadableError(CheckpointError):
    """A checkpoint that may be whole, but cannot be read here and now. An older one must not take its place.

    Attributes:
        passes: whether the cause may be gone a moment later.
    """

    def __init__(self, message: str, passes: bool = False) -> None:
        super().__init__(message)
        self.passes = passes

    @classmethod
    def of(cls, error: OSError, path: Path) -> UnreadableError:
        named = Path(str(error.filename)) if isinstance(error.filename, str | os.PathLike) else path
        return cls(f"{named}: {unreadable(error, named, 'check that disk')}", error.errno in PASSING)


@dataclass(frozen=True)
class CheckpointSummary:
    """The record of a checkpoint whose files have the recorded sizes.

    Attributes:
        written: seconds since 1970.
    """

    path: Path
    step: int
    bytes: int
    written: float


def checkpoint_name(step: int) -> str:
    return f"step-{step:09d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").removesuffix(REPLACED))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint; it may be damaged."""
    return (folder / INDEX_FILE).is_file()


NAME = re.compile(rf"step-(\d{{1,18}})({re.escape(REPLACED)})?", re.ASCII)


def candidates(folder: Path) -> list[Path]:
    """Possible checkpoint folders: the one that `latest` names, then the others, newest first.

    Raises:
        UnreadableError: they cannot be listed.
    """
    try:
        found = [match for name in os.listdir(folder) if (match := NAME.fullmatch(name))]
        latest = latest_name(folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return []
        raise UnreadableError.of(error, folder) from error
    found.sort(key=lambda match: (int(match[1]), match[2] is None), reverse=True)
    return sorted((folder / match[0] for match in found), key=lambda path: path.name != latest)


def latest_name(folder: Path) -> str:
    """What `latest` names; "" if it is missing or damaged.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return read_record(folder / LATEST_FILE).decode(errors="replace").strip()
    except ValueError:
        return ""
    except OSError as error:
        if error.errno in ABSENT | {errno.ELOOP}:
            return ""
        raise


def latest_by_sizes(folder: Path) -> tuple[CheckpointSummary | None, list[str]]:
    """The newest checkpoint whose files have their sizes, and one line per newer one that is damaged or unreadable.

    A run also checks every byte, so it may skip this one too.
    """
    damages: list[str] = []
    try:
        paths = candidates(folder)
    except UnreadableError as error:
        return None, [str(error)]
    for path in paths:
        try:
            found = summary(path)
            check_name(path, found.step)
            return found, damages
        except CheckpointError as error:
            damages.append(str(error))
    return None, damages


def check_name(path: Path, step: int) -> None:
    """Refuse a checkpoint that was copied under another step's name, which tells its place among the others.

    Raises:
        CheckpointError: it was.
    """
    if (match := NAME.fullmatch(path.name)) and int(match[1]) != step:
        raise CheckpointError(f"{path}: holds the checkpoint of step {step}; rename it to {checkpoint_name(step)}")


def summary(path: Path) -> CheckpointSummary:
    """Read a checkpoint's record and compare the sizes of its files with it.

    Raises:
        CheckpointError: the record is missing or damaged, or a file is missing or of another size.
        UnreadableError: it cannot be read.
    """
    content = read_index(path)
    files = file_records(content)
    check_files(path, files, hashed=False)
    size = sum(record.bytes for record in files.values())
    try:
        written = (path / INDEX_FILE).stat().st_mtime
    except OSError as error:
        raise UnreadableError.of(error, path) from error
    return CheckpointSummary(path, content["step"], size, written)


def check_files(
    path: Path, files: Mapping[str, FileRecord], names: Iterable[str] | None = None, hashed: bool = True
) -> None:
    """Compare a checkpoint's files with their records; see `vdtrain.files.damage`.

    Raises:
        CheckpointError: one is damaged.
        UnreadableError: one cannot be read.
    """
    try:
        damaged = damage(path, files, names, hashed)
    except OSError as error:
        raise UnreadableError.of(error, path) from error
    if damaged:
        raise CheckpointError(damaged)


def read_index(folder: Path) -> dict[str, Any]:
    """Contents of checkpoint.json, after a check of its own checksum.

    Raises:
        CheckpointError: if it is missing or damaged.
        UnreadableError: if it cannot be read, or a newer version of vdtrain wrote it.
    """
    path = folder / INDEX_FILE
    try:
        document = json.loads(read_record(path))
        for part in (document, document.get("checkpoint")):
            written = part.get("format") if isinstance(part, dict) else None
            if isinstance(written, int) and written > FORMAT:
                raise UnreadableError(
                    f"{folder}: checkpoint format {written}, and this version of vdtrain reads format {FORMAT}; "
                    "install the version that wrote it"
                )
        content: dict[str, Any] = document["checkpoint"]
        whole = document["sha256"] == index_checksum(content)
        if whole:
            _check_shape(content)
    except OSError as error:
        if error.errno not in ABSENT or folder.is_symlink() or path.is_symlink():
            raise UnreadableError.of(error, path) from error
        raise CheckpointError(f"{folder}: no {INDEX_FILE}, so this is not a complete checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({one_line(error)[:200]})") from error
    if not whole:
        raise CheckpointError(f"{path}: its checksum does not match, the file is damaged")
    return content


def _check_shape(content: dict[str, Any]) -> None:
    if content["format"] not in range(1, FORMAT + 1):
        raise ValueError(f"format {content['format']!r}")
    for name, least in {"step": 0, "world_size": 1, "optimizer_steps": 0}.items():
        if type(content[name]) is not int or content[name] < least:
            raise ValueError(f"{name} is {content[name]!r}")
    if not isinstance(content["trainer"], dict):
        raise ValueError("trainer is not a table")
    for name, record in content["files"].items():
        # A name that leads out of the folder could be any file of the machine.
        if Path(name).name != name or type(record["bytes"]) is not int or not isinstance(record["sha256"], str):
            raise ValueError(f"files.{name}")
    if content["world_size"] > max(1, len(content["files"])):
        raise ValueError(f"{len(content['files'])} files of {content['world_size']} processes")


def file_records(content: dict[str, Any]) -> dict[str, FileRecord]:
    return {name: FileRecord(record["bytes"], record["sha256"]) for name, record in content["files"].items()}


def index_checksum(content: Any) -> str:
    """Checksum of an index, equal before it is written and after it is read back."""
    # JSON turns number keys into text, which sorts differently: 64 before 256, but "256" before "64".
    written = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
