"""What is written as a stream is what `torch.save` would have written."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from vdtrain.config.compose import ConfigError
from vdtrain.weights.exports import STORAGES, write_torch
from vdtrain.weights.tensor_files import LazyTensors

TENSORS = {f"of.{dtype}": torch.arange(6).view(2, 3).to(dtype) for dtype in STORAGES} | {
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "transposed": torch.arange(6.0).view(2, 3).T,
}


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it(tmp_path: Path, mmap: bool) -> None:
    write_torch(tmp_path / "w.pth", TENSORS)
    found = torch.load(tmp_path / "w.pth", weights_only=True, mmap=mmap)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert found[name].is_contiguous()


def test_the_archive_is_whole_and_aligned(tmp_path: Path) -> None:
    write_torch(tmp_path / "w.pth", TENSORS)
    torch.save(TENSORS, tmp_path / "saved.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive, zipfile.ZipFile(tmp_path / "saved.pth") as saved:
        assert archive.testzip() is None
        names, expected = ({name.partition("/")[2] for name in each.namelist()} for each in (archive, saved))
        assert names == {name for name in expected if not name.startswith(".")}
    mapped = torch.load(tmp_path / "w.pth", weights_only=True, mmap=True)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped.values() if tensor.numel())


def test_each_tensor_is_read_once_and_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    reads: list[str] = []
    lazy = LazyTensors.of(TENSORS)
    for name, entry in lazy.entries.items():
        object.__setattr__(entry, "read", lambda name=name, read=entry.read: (reads.append(name), read())[1])
    write_torch(tmp_path / "w.pth", lazy)
    assert reads == list(TENSORS)
    before = (tmp_path / "w.pth").read_bytes()

    def full() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    object.__setattr__(lazy.entries["scalar"], "read", full)
    with pytest.raises(ConfigError, match=r"output=.*w\.pth: .*exists already; overwrite=true replaces it"):
        write_torch(tmp_path / "w.pth", lazy)
    with pytest.raises(ConfigError, match=r"output=.*w\.pth: cannot be written .*No space left.*make room"):
        write_torch(tmp_path / "w.pth", lazy, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]
    assert (tmp_path / "w.pth").read_bytes() == before
