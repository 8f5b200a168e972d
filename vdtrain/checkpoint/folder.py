"""The checkpoints of a run folder, by names, sizes and records. Needs no PyTorch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdtrain.files import REPLACED, FileRecord, damage

FORMAT = 1
CHECKPOINTS = "checkpoints"
INDEX_FILE, LATEST_FILE = "checkpoint.json", "latest"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be read; the message names it and the cause."""


@dataclass(frozen=True)
class CheckpointSummary:
    """The record of a checkpoint whose files have the recorded sizes.

    Attributes:
        step: optimiser steps of its stage.
        bytes: of all its files.
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


def candidates(folder: Path) -> list[Path]:
    """Possible checkpoint folders: the one that `latest` names, then the others, newest first."""
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"step-(\d+)({re.escape(REPLACED)})?")
    found = [match for entry in folder.iterdir() if (match := pattern.fullmatch(entry.name))]
    found.sort(key=lambda match: (int(match[1]), match[2] is None), reverse=True)
    try:
        latest = (folder / LATEST_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        latest = ""
    return sorted((folder / match[0] for match in found), key=lambda path: path.name != latest)


def latest_by_sizes(folder: Path) -> tuple[CheckpointSummary | None, list[str]]:
    """The newest checkpoint whose files have their sizes, and one line per newer, damaged one.

    A run also checks every byte, so it may skip this one too.
    """
    damages: list[str] = []
    for path in candidates(folder):
        try:
            return summary(path), damages
        except CheckpointError as error:
            damages.append(str(error))
    return None, damages


def summary(path: Path) -> CheckpointSummary:
    """Read a checkpoint's record and compare the sizes of its files with it.

    Raises:
        CheckpointError: the record is missing or damaged, or a file is missing or of another size.
    """
    content = read_index(path)
    files = file_records(content)
    if damaged := damage(path, files, hashed=False):
        raise CheckpointError(damaged)
    size = sum(record.bytes for record in files.values())
    return CheckpointSummary(path, int(content["step"]), size, (path / INDEX_FILE).stat().st_mtime)


def read_index(folder: Path) -> dict[str, Any]:
    """Contents of checkpoint.json, after a check of its own checksum.

    Raises:
        CheckpointError: if it is missing, damaged, or of another format.
    """
    try:
        document = json.loads((folder / INDEX_FILE).read_bytes())
        content: dict[str, Any] = document["checkpoint"]
        whole = document["sha256"] == index_checksum(content)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {INDEX_FILE}, so this is not a complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX_FILE}: cannot be read ({error})") from error
    if not whole:
        raise CheckpointError(f"{folder / INDEX_FILE}: its checksum does not match, the file is damaged")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {content['format']}; this version of vdtrain reads format {FORMAT}"
        )
    return content


def file_records(content: dict[str, Any]) -> dict[str, FileRecord]:
    return {name: FileRecord(**record) for name, record in content["files"].items()}


def index_checksum(content: Any) -> str:
    """Checksum of an index, equal before it is written and after it is read back."""
    # JSON turns number keys into text, which sorts differently: 64 before 256, but "256" before "64".
    written = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
