"""What `vdtrain weights export` writes: every format by name."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdtrain.config.schema import ModelConfig
from vdtrain.files import written_whole
from vdtrain.weights.diffusers_folder import write_pipeline
from vdtrain.weights.folder import Tracked, untracked, write_weights_folder
from vdtrain.weights.tensor_files import LazyTensors
from vdtrain.weights.versatile_diffusion import to_released

ROOT = "archive"
VERSION = "3\n"
# Where PyTorch puts the bytes of a tensor, so that they can be used in place.
ALIGNMENT = 64
LOCAL_HEADER_BYTES = 30
PADDING_HEADER = b"FB"
STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


class _Storage:
    """Stands for the bytes of a tensor in the pickle."""

    def __init__(self, number: int, tensor: Tensor) -> None:
        self.number, self.tensor = number, tensor


class _Pickler(pickle.Pickler):
    """Writes tensors as PyTorch does: a call that rebuilds each from its bytes elsewhere."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return ("storage", STORAGES[obj.tensor.dtype], str(obj.number), "cpu", obj.tensor.numel())

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Rebuilt):
            return NotImplemented
        tensor = obj.storage.tensor
        hooks: OrderedDict[str, Any] = OrderedDict()
        arguments = (obj.storage, 0, tuple(tensor.shape), tensor.stride(), False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


class _Rebuilt:
    """Stands for a tensor in the pickle."""

    def __init__(self, storage: _Storage) -> None:
        self.storage = storage


def write_torch(
    path: Path,
    tensors: Mapping[str, Tensor],
    setting: str = "output",
    overwrite: bool = False,
    tracked: Tracked = untracked,
) -> None:
    """Write a state dict that `torch.load` reads; the file appears when it is whole.

    Args:
        tensors: each is read once, and keeps its dtype.
        setting: names where the path comes from, in errors.
        overwrite: replace what is there.

    Raises:
        ConfigError: there is something already, or the file cannot be written.
    """
    outline = LazyTensors.of(tensors).outline()
    content = io.BytesIO()
    _Pickler(content, protocol=2).dump(
        {name: _Rebuilt(_Storage(number, tensor)) for number, (name, tensor) in enumerate(outline.items())}
    )
    with (
        written_whole(path, f"{setting}={path}", overwrite) as draft,
        zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive,
    ):
        _add(archive, "data.pkl", content.getbuffer())
        _add(archive, "byteorder", memoryview(sys.byteorder.encode()))
        for number, (_, tensor) in enumerate(tracked(tensors.items(), len(tensors))):
            _add(archive, f"data/{number}", _bytes(tensor))
        _add(archive, "version", memoryview(VERSION.encode()))


def _add(archive: zipfile.ZipFile, name: str, content: memoryview) -> None:
    """Add a record whose bytes start at a multiple of `ALIGNMENT` in the file."""
    record = zipfile.ZipInfo(f"{ROOT}/{name}")
    assert archive.fp is not None
    # The module keeps sizes that need it in an extra field of its own, beside ours.
    large = 20 if content.nbytes >= 2**31 else 0
    begin = archive.fp.tell() + LOCAL_HEADER_BYTES + len(record.filename) + large + 4
    record.extra = PADDING_HEADER + (padding := -begin % ALIGNMENT).to_bytes(2, "little") + bytes(padding)
    record.file_size = content.nbytes
    with archive.open(record, "w", force_zip64=bool(large)) as file:
        file.write(content)


def _bytes(tensor: Tensor) -> memoryview:
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


Write = Callable[[Path, LazyTensors, ModelConfig, bool, Tracked], None]
"""(output, the diffuser by our names, its model, whether to replace what is there, progress)."""

DTYPES: dict[str, torch.dtype | None] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "keep": None,
}
OUTPUT = "output"


def _released(output: Path, tensors: LazyTensors, model: ModelConfig, overwrite: bool, tracked: Tracked) -> None:
    write_torch(output, tensors.renamed({to_released(name): name for name in tensors}), OUTPUT, overwrite, tracked)


def _weights_folder(output: Path, tensors: LazyTensors, model: ModelConfig, overwrite: bool, tracked: Tracked) -> None:
    write_weights_folder(output, tensors, model, OUTPUT, overwrite, tracked)


def _pipeline(output: Path, tensors: LazyTensors, model: ModelConfig, overwrite: bool, tracked: Tracked) -> None:
    write_pipeline(output, tensors, model, OUTPUT, overwrite)


WRITERS: dict[str, Write] = {
    "versatile_diffusion": _released,
    "safetensors": _weights_folder,
    "diffusers": _pipeline,
}
