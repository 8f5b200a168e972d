"""Tensors by name from any weights file. A tensor is read on access, so a 10 GB file takes the memory of one tensor.

Reads safetensors, one file or several with an index, and PyTorch's files. The content decides on the kind of a file,
not its suffix. Nothing in a file is run.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vdtrain.errors import one_line
from vdtrain.files import SHAPE_ERRORS, read_json
from vdtrain.models.frozen_weights import WeightsError, is_finite
from vdtrain.weights.torch_reading import read_state_dict

# In order of preference.
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
VARIANTS = ("", "fp16", "bf16")
INDEX = re.compile(r"\.index(\.\w+)?\.json$")
# model.safetensors, model.fp16.safetensors, model-00001-of-00002.fp16.safetensors, model.fp16-00001-of-2.safetensors
WEIGHTS = re.compile(r"[^.]+(?:\.(\w+))?(-\d+-of-\d+)?(?:\.(\w+))?(\.\w+)")
# model.safetensors.index.json, model.safetensors.index.fp16.json, model.fp16.safetensors.index.json
INDICES = re.compile(r"[^.]+(?:\.(\w+))?(\.\w+)\.index(?:\.(\w+))?\.json")


@dataclass(frozen=True)
class Choice:
    """One form of a folder's weights: a precision and a file format.

    Attributes:
        index: name of the index file, if there is one.
        files: names of the weights files.
    """

    index: str | None
    files: list[str]


def choose(names: Iterable[str]) -> Choice | None:
    """The form to read: full precision before variants ("model.fp16.bin"), then safetensors before pickles.

    None if no file has weights.
    """
    files: dict[tuple[str, str], list[str]] = {}
    indices: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        if match := INDICES.fullmatch(name):
            indices.setdefault((match[1] or match[3] or "", match[2]), name)
        elif name.endswith(SUFFIXES):
            match = WEIGHTS.fullmatch(name)
            variant, suffix = (match[1] or match[3] or "", match[4]) if match else ("", name[name.rindex(".") :])
            files.setdefault((variant, suffix), []).append(name)
    for form in sorted(files.keys() | indices.keys(), key=_preference):
        return Choice(indices.get(form), files.get(form, []))
    return None


def _preference(form: tuple[str, str]) -> tuple[int, str, int]:
    variant, suffix = form
    rank = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
    return rank, variant, SUFFIXES.index(suffix) if suffix in SUFFIXES else len(SUFFIXES)


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
# Names that parallel and compiled models add to the names of weights.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Entry:
    """A tensor that is not read yet: shape, dtype, and how to read it."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        return cls(tensor.shape, tensor.dtype, lambda: tensor)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, on the CPU. Each access reads a tensor and keeps nothing. Names, shapes and dtypes are known.

    Args:
        metadata: strings in the header of a safetensors file.
    """

    def __init__(self, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
        self.entries, self.metadata = dict(entries), dict(metadata or {})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """From tensors in memory, or from lazy ones."""
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

    def meta(self) -> dict[str, Tensor]:
        """Every tensor on the meta device: shape and dtype without values."""
        return {
            name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in self.entries.items()
        }

    def renamed(self, names: Mapping[str, str]) -> LazyTensors:
        """The tensors under other names. `names` maps new to old names; several new names may have one old name."""
        return LazyTensors({new: self.entries[old] for new, old in names.items()})

    def cast(self, dtype: torch.dtype | None) -> LazyTensors:
        """With floating-point tensors in another precision; None changes nothing."""
        if dtype is None:
            return self

        def read(name: str, entry: Entry) -> Tensor:
            tensor, given = entry.read().to(dtype), entry.dtype
            if torch.finfo(dtype).max < torch.finfo(given).max and not is_finite(tensor):
                raise WeightsError(f"precision=fp16: {name} holds values beyond its range; choose bf16, fp32 or keep")
            return tensor

        return LazyTensors(
            {
                name: Entry(entry.shape, dtype, partial(read, name, entry)) if entry.dtype.is_floating_point else entry
                for name, entry in self.entries.items()
            }
        )

    def checked(self, place: str) -> LazyTensors:
        """The same tensors; access raises a WeightsError if a value is not finite."""

        def read(name: str, entry: Entry) -> Tensor:
            tensor = entry.read()
            if not is_finite(tensor):
                raise WeightsError(
                    f"{place}: {name} holds values that are NaN or infinite; fetch it again, or give other weights"
                )
            return tensor

        return LazyTensors(
            {name: Entry(entry.shape, entry.dtype, partial(read, name, entry)) for name, entry in self.entries.items()},
            self.metadata,
        )

    def unwrapped(self, place: str) -> LazyTensors:
        """The same tensors, without the names of wrappers for training such as "module." and "_orig_mod."."""
        names = {key: ".".join(word for word in key.split(".") if word not in WRAPPERS) for key in self.entries}
        if len(set(names.values())) < len(names):
            raise WeightsError(f"{place}: holds weights twice, with and without {' or '.join(WRAPPERS)} in their names")
        return LazyTensors({name: self.entries[key] for key, name in names.items()}, self.metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.shape.numel() * entry.dtype.itemsize for entry in self.entries.values())

    @property
    def summary(self) -> str:
        """Number, precision and size of the tensors, for people."""
        dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in self.entries.values()})
        return f"{len(self):,} tensors, {' and '.join(dtypes)}, {self.nbytes / 1e6:,.1f} MB"


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether names, dtypes and values are equal."""
    pairs = ((first[name], second[name]) for name in first)
    return first.keys() == second.keys() and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def open_tensors(path: Path, setting: str) -> LazyTensors:
    """Open a weights file, an index of shards, or a folder with either.

    Args:
        path: safetensors; an index of shards (`*.index.json`); or a state dict by `torch.save`, alone or in a mapping
            such as {"state_dict": ...}. Files by PyTorch before 1.6 are read into memory as a whole.
        setting: names where the path comes from, in errors.

    Raises:
        WeightsError: the file does not exist, is truncated, needs to run code, or is not a file of tensors.
    """
    place = f"{setting}={path}"
    try:
        if path.is_dir():
            path = _weights_file(path, place)
        if path.is_symlink() and not path.exists():
            raise WeightsError(f"{place}: {path.name} is a link to a missing file; fetch it again")
        if not path.is_file():
            raise WeightsError(f"{place}: no such file; give a weights file, or a folder with one")
        tensors = _open_shards(path, place) if INDEX.search(path.name) else _open_file(path, place)
    except OSError as error:
        raise WeightsError(
            f"{place}: {path.name} cannot be read ({error.strerror or error}); fetch it again"
        ) from error
    return tensors.unwrapped(place).checked(place)


def _weights_file(folder: Path, place: str) -> Path:
    """The index or the only weights file of a folder."""
    choice = choose([path.name for path in folder.iterdir()])
    if choice is None:
        raise WeightsError(f"{place}: a folder without weights; give one with *.safetensors, or a file")
    if choice.index is not None:
        return folder / choice.index
    if len(choice.files) == 1:
        return folder / choice.files[0]
    names = ", ".join(choice.files[:5])
    if all(re.search(r"-\d+-of-\d+", name) for name in choice.files):
        raise WeightsError(f"{place}: holds shards ({names}) without their index; fetch all files of the folder")
    raise WeightsError(f"{place}: holds {len(choice.files)} weights files ({names}); name one of them")


def _open_shards(index: Path, place: str) -> LazyTensors:
    try:
        files = {str(key): str(file) for key, file in read_json(index)["weight_map"].items()}
    except SHAPE_ERRORS as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise WeightsError(f"{place}: {index.name} is not an index of weights ({reason}); fetch it again") from error
    opened: dict[str, LazyTensors] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise WeightsError(f"{place}: {index.name} names {name}, which is outside the folder; fetch it again")
        if not (index.parent / name).is_file():
            raise WeightsError(f"{place}: {name} is missing beside {index.name}; fetch all files of the folder")
        opened[name] = _open_file(index.parent / name, place)
    if absent := [key for key, file in files.items() if key not in opened[file]]:
        raise WeightsError(
            f"{place}: {absent[0]} is not in {files[absent[0]]}; the files are of different weights, fetch them again"
        )
    return LazyTensors({key: opened[file].entries[key] for key, file in files.items()})


def _open_file(path: Path, place: str) -> LazyTensors:
    with path.open("rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    if start.startswith(LFS_POINTER):
        raise WeightsError(f"{place}: {path.name} is a pointer of Git LFS, not the file; run `git lfs pull` there")
    if _is_tar(start):
        raise WeightsError(f"{place}: {path.name} is a tar archive; unpack it and give the weights file in it")
    if start.startswith((b"PK", b"\x80")):
        return _checked_dtypes(LazyTensors.of(read_state_dict(path, place)), place)
    # Safetensors has eight bytes of length, then JSON.
    if start[8:9] == b"{":
        return _open_safetensors(path, place)
    if not start:
        raise WeightsError(f"{place}: {path.name} is empty; fetch it again")
    raise WeightsError(f"{place}: {path.name} is not a file of tensors; give safetensors or a file by torch.save")


def _open_safetensors(path: Path, place: str) -> LazyTensors:
    try:
        file: Any = safe_open(path, framework="pt")
        entries = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            piece = file.get_slice(name)
            dtype = DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise WeightsError(f"{place}: {name} is {piece.get_dtype()}; give weights that are not quantised")
            entries[name] = Entry(torch.Size(piece.get_shape()), dtype, partial(file.get_tensor, name))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{place}: {path.name} is truncated or damaged ({error}); fetch it again") from error
    return LazyTensors(entries, file.metadata())


def _checked_dtypes(tensors: LazyTensors, place: str) -> LazyTensors:
    for name, entry in tensors.entries.items():
        if entry.dtype not in DTYPES.values():
            raise WeightsError(f"{place}: {name} is {entry.dtype}; give weights that are not quantised")
    return tensors


def _is_tar(start: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
