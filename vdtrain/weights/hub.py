"""The local path of published weights: a path of the user's, or files of a Hugging Face repository at one commit."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from vdtrain.errors import one_line
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights.tensor_files import SUFFIXES, choose

PREFIX = "hf:"
ADDRESS = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:/([^@]+))?@(.+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
DESCRIPTIONS = (".json", ".txt")


def fetched(path: str, parts: Collection[str]) -> Path:
    """The local path of published weights; an address is downloaded into Hugging Face's cache.

    Args:
        path: a local path, a repository's folder in the client's cache, or `hf:ORG/REPO[/FILE_OR_FOLDER]@COMMIT`.
        parts: files or subfolders that are needed of a folder; none for all weights and descriptions.

    Raises:
        WeightsError: the path or repository does not exist, the commit is not complete, or the network fails.
    """
    if not path.startswith(PREFIX):
        local = Path(path).expanduser()
        if not local.exists():
            raise WeightsError(
                f"path={path}: no such file or folder; give an existing path, or hf:ORG/REPO/FILE@COMMIT"
            )
        return _snapshot(local, path)
    match = ADDRESS.fullmatch(path)
    if match is None or ".." in path or not COMMIT.fullmatch(match[3]):
        raise WeightsError(
            f"path={path}: not of the form hf:ORG/REPO[/FILE_OR_FOLDER]@COMMIT with a commit of 40 digits; "
            "pin a commit, so that the weights cannot change"
        )
    repository, inside, commit = match.groups()
    try:
        return _download(repository, (inside or "").strip("/"), commit, parts)
    except WeightsError:
        raise
    # The client raises its own errors, its HTTP library's and the system's, and they change with its version.
    except Exception as error:
        reason = one_line(error)[:200]
        raise WeightsError(
            f"path={path}: cannot be fetched ({reason}); check the name and the network, or fetch it elsewhere and "
            "give the local path"
        ) from error


def _snapshot(local: Path, path: str) -> Path:
    """The folder of files, if a path is a repository's folder in the cache of Hugging Face's client."""
    snapshots = local / "snapshots"
    if not (snapshots.is_dir() and (local / "blobs").is_dir()):
        return local
    found = sorted(snapshots.iterdir())
    if len(found) != 1:
        names = ", ".join(each.name for each in found[:5])
        raise WeightsError(f"path={path}: a cache with {len(found)} commits ({names}); give one, snapshots/COMMIT")
    return found[0]


def _download(repository: str, inside: str, commit: str, parts: Collection[str]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    if PurePosixPath(inside).suffix in (*SUFFIXES, *DESCRIPTIONS):
        return Path(hf_hub_download(repository, inside, revision=commit))
    below = f"{inside}/" if inside else ""
    files = [
        name.removeprefix(below)
        for name in HfApi().list_repo_files(repository, revision=commit)
        if name.startswith(below)
    ]
    wanted = needed(files, parts)
    if not wanted:
        raise WeightsError(f"path=hf:{repository}/{inside}@{commit}: holds no weights; name the file or folder in it")
    for name in wanted:
        file = Path(hf_hub_download(repository, below + name, revision=commit))
    return file.parents[len(PurePosixPath(name).parts) - 1]


def needed(files: Collection[str], parts: Collection[str]) -> list[str]:
    """The files of a repository that an import reads: one form of weights for each folder."""
    inside = [
        name for name in files if not parts or name in parts or name.startswith(tuple(f"{part}/" for part in parts))
    ]
    chosen = [name for name in inside if name.endswith(DESCRIPTIONS)]
    for folder in sorted({str(PurePosixPath(name).parent) for name in inside}):
        here = [name for name in inside if str(PurePosixPath(name).parent) == folder]
        by_name = {PurePosixPath(name).name: name for name in here}
        if choice := choose(by_name):
            chosen += [by_name[name] for name in choice.files]
    return chosen
