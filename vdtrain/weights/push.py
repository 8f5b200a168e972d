"""`vdtrain weights push`: sends an export to the Hugging Face hub, and nothing else.

The client is imported inside the functions, so that help and errors of the command line are fast.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from vdtrain.config.command_schema import WeightsConfig
from vdtrain.errors import ConfigError, described, one_line
from vdtrain.weights.folder import CARD_FILE, is_weights_folder, open_weights_folder
from vdtrain.weights.tensor_files import SUFFIXES

PIPELINE_FILE = "model_index.json"
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
    elif not (folder / PIPELINE_FILE).is_file():
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
