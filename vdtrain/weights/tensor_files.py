"""Tensors by name out of any weights file, each read when it is asked for: a 10 GB file takes the memory of one tensor.

Safetensors, one file or several with an index, and PyTorch's files. A file is told by its content, not by its ending.
Nothing in it is run.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vdtrain.models.frozen_weights import WeightsError

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
INDEX_SUFFIX = ".index.json"
# The published sd-v1-4.ckpt keeps training state under this class.
LIGHTNING_CLASS = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Entry:
    """A tensor that is somewhere else: its outline, and how it is read."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        return cls(tensor.shape, tensor.dtype, lambda: tensor)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, on the CPU. Access reads; nothing read is kept, and names, shapes and dtypes cost no reading."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The same of tensors that are in memory, or lazy already."""
        if isinstance(tensors, LazyTensors):
            return cls(tensors.entries)
        return cls({name: Entry.of(tensor) for name, tensor in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def outline(self) -> dict[str, Tensor]:
        """Every tensor without its values, on the meta device: shapes and dtypes."""
        return {
            name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in self.entries.items()
        }

    def renamed(self, names: Mapping[str, str]) -> LazyTensors:
        """The tensors under other names, new name -> old name. An old name may serve several new ones, or none."""
        return LazyTensors({new: self.entries[old] for new, old in names.items()})

    def cast(self, dtype: torch.dtype | None) -> LazyTensors:
        """Floating-point tensors in another precision, the others as they are; None changes nothing."""
        if dtype is None:
            return self

        def converted(entry: Entry) -> Entry:
            return Entry(entry.shape, dtype, lambda: entry.read().to(dtype))

        return LazyTensors(
            {name: converted(entry) if entry.dtype.is_floating_point else entry for name, entry in self.entries.items()}
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.shape.numel() * entry.dtype.itemsize for entry in self.entries.values())

    @property
    def summary(self) -> str:
        """Number, precision and size of the tensors, for people."""
        dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in self.entries.values()})
        return f"{len(self):,} tensors, {' and '.join(dtypes)}, {self.nbytes / 1e6:,.1f} MB"


class _Placeholder:
    """Stands for Lightning's class, so that the file can be read without it: nothing of it is run or kept."""


def open_tensors(path: Path, setting: str) -> LazyTensors:
    """Open a weights file, an index of several, or a folder that holds either.

    Args:
        path: safetensors; an index of shards (`*.index.json`); or what `torch.save` wrote of a state dict, alone or as
            the entry `state_dict` of a mapping. Files of PyTorch before 1.6 are read into memory as a whole.
        setting: names where the path comes from, in errors.

    Raises:
        WeightsError: one line: it does not exist, is truncated, asks to run code, or is no tensor file.
    """
    place = f"{setting}={path}"
    if path.is_dir():
        path = _weights_file(path, place)
    if not path.is_file():
        raise WeightsError(f"{place}: no such file; give a weights file, or a folder with one")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path, place)
    return _open_file(path, place)


def _weights_file(folder: Path, place: str) -> Path:
    """The index or the one weights file of a folder; rather safetensors, and not a variant ("model.fp16.bin")."""
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"), key=lambda path: (".safetensors." not in path.name, path.name))
    files = [path for suffix in SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    for found in (indices, [path for path in files if "." not in path.stem], files):
        preferred = [path for path in found if path.suffix == found[0].suffix]
        if len(preferred) == 1 or (found is indices and found):
            return found[0]
        if found:
            names = ", ".join(path.name for path in preferred[:5])
            raise WeightsError(f"{place}: holds {len(preferred)} weights files ({names}); name one of them")
    raise WeightsError(f"{place}: a folder without weights; give one with *.safetensors, or a file")


def _open_shards(index: Path, place: str) -> LazyTensors:
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{place}: {index.name} is no index of weights ({error!r}); fetch it again") from error
    opened: dict[str, LazyTensors] = {}
    for name in sorted(set(map(str, files.values()))):
        if Path(name).name != name:
            raise WeightsError(f"{place}: {index.name} names {name}, which lies outside of the folder; fetch it again")
        if not (index.parent / name).is_file():
            raise WeightsError(f"{place}: {name} is missing beside {index.name}; fetch all files of the folder")
        opened[name] = _open_file(index.parent / name, place)
    if absent := [key for key, file in files.items() if key not in opened[file]]:
        raise WeightsError(f"{place}: {absent[0]} is not in {files[absent[0]]}; the files are of different weights")
    return LazyTensors({key: opened[file].entries[key] for key, file in files.items()})


def _open_file(path: Path, place: str) -> LazyTensors:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(LFS_POINTER):
        raise WeightsError(f"{place}: {path.name} is a pointer of Git LFS, not the file; run `git lfs pull` there")
    if start.startswith(b"PK"):
        return _open_torch(path, place, zipped=True)
    if start.startswith(b"\x80"):
        return _open_torch(path, place, zipped=False)
    # Safetensors: eight bytes of length, then JSON.
    if start[8:9] == b"{":
        return _open_safetensors(path, place)
    raise WeightsError(f"{place}: {path.name} is no file of tensors; give safetensors or what torch.save writes")


def _open_safetensors(path: Path, place: str) -> LazyTensors:
    try:
        file: Any = safe_open(path, framework="pt")
        entries = {}
        for name in file.keys():  # noqa: SIM118 - no mapping
            piece = file.get_slice(name)
            dtype = DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise WeightsError(f"{place}: {name} is {piece.get_dtype()}; give weights that are not quantised")
            entries[name] = Entry(torch.Size(piece.get_shape()), dtype, partial(file.get_tensor, name))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{place}: {path.name} is truncated or damaged ({error}); fetch it again") from error
    return LazyTensors(entries)


def _open_torch(path: Path, place: str, zipped: bool) -> LazyTensors:
    damaged = f"{place}: {path.name} is truncated or damaged; fetch it again"
    if zipped:
        if not zipfile.is_zipfile(path):
            raise WeightsError(damaged)
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise WeightsError(
                    f"{place}: {path.name} is a TorchScript program, which would have to be run; give the same weights "
                    "as safetensors or as a state dict (for CLIP: Hugging Face's openai/clip-vit-large-patch14)"
                )
    try:
        with torch.serialization.safe_globals([(_Placeholder, LIGHTNING_CLASS)]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"{place}: cannot be read as plain tensors ({reason}); convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise WeightsError(damaged) from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    tensors = {
        str(name): tensor.detach()
        for name, tensor in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(tensor, Tensor)
    }
    if not tensors:
        raise WeightsError(f"{place}: {path.name} holds no tensors by name; give the state dict of a model")
    return LazyTensors.of(tensors)
