"""What the frozen parts of a run are made of, told by the contents of their files, wherever these lie."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vdtrain.config import ModelConfig
from vdtrain.files import FileRecord
from vdtrain.models.frozen_weights import locate, named_files
from vdtrain.training import distributed


def frozen_files(model: ModelConfig | DictConfig) -> dict[str, str]:
    """The files of all frozen parts, by the setting that names each."""
    files: dict[str, str] = {}
    for name, modality in model.modalities.items():
        for part in ("vae", "context_encoder"):
            specification = modality[part] if isinstance(modality, DictConfig) else getattr(modality, part)
            if isinstance(specification, DictConfig):
                specification = OmegaConf.to_container(specification, resolve=True)
            files |= named_files(specification, f"model.modalities.{name}.{part}")
    return files


def frozen_contents(model: ModelConfig) -> dict[str, str]:
    """SHA-256 of every file of the frozen parts, by the setting that names it.

    Every process calls this together and reads its share of the files.

    Raises:
        SharedError: on every process, if a file cannot be read on one of them.
    """
    files = {setting: locate(path, setting) for setting, path in frozen_files(model).items()}
    own = sorted(set(files.values()))[distributed.rank() :: distributed.world_size()]
    hashes, failure = {}, None
    try:
        hashes = {str(path): sha256(path) for path in own}
    except OSError as error:
        failure = f"{error.filename}: cannot be read ({error.strerror}); fetch it again"
    distributed.raise_if_any(failure)
    shares = distributed.gather_json(hashes)
    everything = {path: value for share in shares for path, value in share.items()}
    return {setting: everything[str(path)] for setting, path in files.items()}


def sha256(path: Path) -> str:
    """A file's hash; taken once in the life of this process unless the file changes."""
    found = path.stat()
    return _sha256(path, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache
def _sha256(path: Path, *version: int) -> str:
    return FileRecord.of(path).sha256


def differing(recorded: Mapping[str, str], contents: Mapping[str, str]) -> list[str]:
    """Settings whose file is another one than was recorded; what only one of the two has is not compared."""
    return [setting for setting, value in contents.items() if recorded.get(setting, value) != value]
