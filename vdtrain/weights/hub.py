"""The Hugging Face hub: published weights at one commit, and exports that `vdtrain weights push` sends there.

The client is imported inside the functions, so that help and errors of the command line are fast.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from vdtrain.config.command_schema import WeightsConfig
from vdtrain.errors import ConfigError, described, one_line
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights.folder import CARD_FILE, is_export, is_weights_folder, open_weights_folder
from vdtrain.weights.tensor_files import SUFFIXES, choose

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
SAFETENSORS = ".safetensors"
# What may stand beside the weights: descriptions, vocabularies, and images of a model card.
SENT = (SAFETENSORS, ".json", ".yaml", ".txt", ".md", ".png", ".jpg", ".jpeg", ".webp")
LICENCE = "LICENSE"
# How a pickle begins, alone (protocols 2 to 5) or in PyTorch's archive.
PICKLES = (*(bytes((0x80, protocol)) for protocol in range(2, 6)), b"PK\x03\x04")
ABSOLUTE = re.compile(r"(?:^|[\s'\"\[,:])(/[^\s'\",\]}]+)", re.MULTILINE)


def push(export: str, config: WeightsConfig) -> int:
    """Send the files of an export to `config.repo`; the exit status.

    Raises:
        ConfigError: `export` is no export, or may not be sent; no repository or token; the hub refuses, or cannot be
            reached.
    """
    folder, place = Path(export).expanduser(), f"push {export}"
    repo = config.repo
    if repo is None or not REPOSITORY.fullmatch(repo):
        raise ConfigError(f"repo={repo or ''}: name the repository of the hub, repo=NAMESPACE/NAME")
    files, others = files_of(folder, place)
    size = sum(file.stat().st_size for file in files)
    for file in others:
        print(f"left out: {file.relative_to(folder)}")
    for line in local_paths(folder):
        print(f"note: {line}")
    if config.dry_run:
        for file in files:
            print(f"{file.relative_to(folder)}  ({file.stat().st_size / 1e6:,.1f} MB)")
        print(f"dry run: {len(files)} files, {size / 1e6:,.1f} MB, would go to {repo}; nothing was sent")
        return 0
    print(f"{send(folder, files, repo, config.private)}  ({len(files)} files, {size / 1e6:,.1f} MB)")
    return 0


def files_of(folder: Path, place: str) -> tuple[list[Path], list[Path]]:
    """The files of an export that may be sent, and those that stay, each in order of their names.

    Raises:
        ConfigError: it is no export, is not whole, or holds a pickle or a link to a file elsewhere.
    """
    if folder.is_file() or folder.suffix in SUFFIXES:
        raise ConfigError(
            f"{place}: a file of PyTorch, which can hold code, is not sent; export safetensors or diffusers, and push "
            "that folder"
        )
    if not folder.is_dir():
        raise ConfigError(f"{place}: no such folder; make it with `vdtrain weights export safetensors {folder.name}`")
    if is_weights_folder(folder):
        open_weights_folder(folder, "push")
    elif not is_export(folder):
        raise ConfigError(
            f"{place}: not an export; make one with `vdtrain weights export safetensors OUTPUT {folder.name}`, and "
            "push OUTPUT"
        )
    try:
        return _sorted_out(folder, place)
    except OSError as error:
        raise ConfigError(f"{place}: {described(error)}") from error


def _sorted_out(folder: Path, place: str) -> tuple[list[Path], list[Path]]:
    sent: list[Path] = []
    others: list[Path] = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{place}: {inside} is a link to a file outside; put the file itself there, or remove it")
        if file.is_dir():
            continue
        known = inside.suffix in SENT or inside.name == LICENCE
        if any(part.startswith(".") for part in inside.parts) or not file.is_file():
            others.append(file)
            continue
        with file.open("rb") as content:
            head = content.read(4)
        if inside.suffix in (*SUFFIXES[1:], ".pkl", ".pickle") or head.startswith(PICKLES):
            raise ConfigError(f"{place}: {inside} is a pickle, which can hold code; remove it, and push again")
        if inside.suffix == SAFETENSORS:
            _check_safetensors(file, place)
        (sent if known else others).append(file)
    if folder / CARD_FILE not in sent:
        raise ConfigError(f"{place}: has no model card, {CARD_FILE}; export it again, or write one")
    return sent, others


def _check_safetensors(file: Path, place: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ConfigError(f"{place}: {file.name} is not safetensors ({one_line(error)}); export it again") from error


def local_paths(folder: Path) -> list[str]:
    """A line on each absolute path in the model's configuration, which others cannot read."""
    file = folder / "model.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [
        f"{file.name} names {path}, which others do not have; export again with that setting below weights/"
        for path in dict.fromkeys(ABSOLUTE.findall(text))
    ]


def send(folder: Path, files: list[Path], repo: str, private: bool) -> str:
    """Make the repository if it is not there, and add the files in one commit; the address of the commit.

    Large files go first, and a repeated call does not send them again.

    Raises:
        ConfigError: there is no token, the hub refuses, or it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    token = get_token()
    if token is None:
        raise ConfigError(
            f"repo={repo}: no token of the hub; set HF_TOKEN to one that may write, or log in with `hf auth login`"
        )
    api = HfApi(token=token)
    operations = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ConfigError(f"repo={repo}: exists and is public, whatever private=true asks for; give another repo")
        made = api.create_commit(repo, operations, commit_message=f"Add {folder.name}")
    except ConfigError:
        raise
    # The client raises its own errors, its HTTP library's and the system's, and they change with its version.
    except Exception as error:
        raise ConfigError(f"repo={repo}: {_refusal(error)}") from error
    return str(made.commit_url)


def _refusal(error: Exception) -> str:
    """Why the hub took nothing, and what helps."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = (getattr(error, "server_message", None) or one_line(error))[:200]
    if status == 401:
        return "the hub does not accept the token; set HF_TOKEN to a valid one, or log in with `hf auth login`"
    if status == 403:
        return f"the token may not write there ({reason}); take one with the right to write, or another namespace"
    if status == 404:
        return "no such repository or namespace, or the token may not see it; correct repo=NAMESPACE/NAME"
    if status is not None:
        return f"the hub refuses with status {status} ({reason})"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return f"{endpoint} cannot be reached ({reason}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE"


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
