"""img2dataset's shards of one part: each is a tar, a parquet file, and statistics, which are written last."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.failures import DownloadStats
from data_pipeline.index.tar_members import BLOCK, parse
from vdtrain.errors import one_line
from vdtrain.files import SHAPE_ERRORS, read_json

STATISTICS = "_stats.json"
BEFORE = ".before"


def finished(folder: Path) -> list[Path]:
    """Statistics files of the complete shards."""
    return sorted(folder.glob(f"*{STATISTICS}"))


def begun(folder: Path) -> bool:
    """Whether a shard has ever been completed."""
    return any(folder.glob(f"*{STATISTICS}*"))


def tally(statistics: Path) -> DownloadStats:
    """Images of a shard by reason; a ValueError if its statistics are damaged, an OSError if they cannot be read."""
    document = read_json(statistics)
    try:
        return DownloadStats({str(message): int(count) for message, count in document["status_dict"].items()})
    except SHAPE_ERRORS as error:
        raise ValueError(f"{statistics.name} is damaged ({one_line(error)})") from error


def successes(statistics: Path) -> int:
    """Number of samples that the tar of a shard should have; errors are those of `tally`."""
    document = read_json(statistics)
    try:
        return int(document["successes"]) if "successes" in document else tally(statistics).successes
    except SHAPE_ERRORS as error:
        raise ValueError(f"{statistics.name} is damaged ({one_line(error)})") from error


def problem(statistics: Path) -> str | None:
    """Why a shard with statistics is incomplete, or None; the index checks the images themselves."""
    tar = _member(statistics, ".tar")
    try:
        expected, found = successes(statistics), samples(tar)
        tally(statistics)
    except (OSError, ValueError) as error:
        return f"{tar}: {error}"
    if found != expected:
        return f"{tar}: {found} samples instead of {expected}"
    return None if _member(statistics, ".parquet").exists() else f"{tar}: its parquet file is missing"


def samples(tar: Path) -> int:
    """Number of images in a tar file, by its headers alone; a ValueError if it is truncated or damaged."""
    count, position, size = 0, 0, tar.stat().st_size
    with tar.open("rb") as file:
        while True:
            file.seek(position)
            header = file.read(BLOCK)
            if len(header) < BLOCK or position > size:
                raise ValueError("cut short")
            if not any(header):
                if any(file.read(BLOCK)) or file.tell() < position + 2 * BLOCK:
                    raise ValueError("cut short")
                return count
            name, length, _ = parse(header, position)
            count += name.endswith(".jpg")
            position += BLOCK + -(-length // BLOCK) * BLOCK


def remove(statistics: Path) -> None:
    """Remove a shard, its statistics first, so that it never looks complete."""
    for file in _files(statistics):
        file.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove shards without statistics, which an interrupted run left."""
    done = {file.name.removesuffix(STATISTICS) for file in finished(folder)}
    for file in [*folder.glob("*.tar"), *folder.glob("*.parquet")]:
        if file.stem not in done:
            file.unlink()


def set_aside(statistics: Path) -> None:
    """Rename a shard for a retry, to names that neither img2dataset nor the index reads."""
    for file in _files(statistics):
        file.replace(file.with_name(file.name + BEFORE))


def settle(folder: Path) -> None:
    """Keep the better attempt of each retried shard; the old one stays until the new one is complete."""
    for before in folder.glob(f"*{STATISTICS}{BEFORE}"):
        statistics = before.with_name(before.name.removesuffix(BEFORE))
        if statistics.exists():
            olds = [file.with_name(file.name + BEFORE) for file in _files(statistics)]
            if _successes(before) > _successes(statistics) and all(old.exists() for old in olds):
                remove(statistics)
                for old in reversed(olds):  # the statistics last
                    old.replace(old.with_name(old.name.removesuffix(BEFORE)))
            else:
                for old in olds:
                    old.unlink(missing_ok=True)


def _successes(statistics: Path) -> int:
    """Images of a shard; less than 0 if its statistics are damaged."""
    try:
        return tally(statistics).successes
    except ValueError:
        return -1


def _files(statistics: Path) -> list[Path]:
    """A shard's files, its statistics first."""
    return [statistics, _member(statistics, ".tar"), _member(statistics, ".parquet")]


def _member(statistics: Path, suffix: str) -> Path:
    return statistics.with_name(statistics.name.removesuffix(STATISTICS) + suffix)
