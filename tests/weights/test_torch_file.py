"""A state dict that `torch.load` reads: the tensors alone, and nothing of a failure."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vdtrain.config.compose import ConfigError
from vdtrain.weights.exports import write_torch
from vdtrain.weights.tensor_files import DTYPES, LazyTensors

TENSORS = {f"of.{dtype}": torch.arange(6).view(2, 3).to(dtype) for dtype in DTYPES.values()} | {
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


def test_a_view_is_written_without_the_rest(tmp_path: Path) -> None:
    whole = torch.zeros(1_000_000)
    write_torch(tmp_path / "w.pth", {"first": whole[:2], "last": whole[-2:]})
    assert (tmp_path / "w.pth").stat().st_size < 10_000
    found = torch.load(tmp_path / "w.pth", weights_only=True)
    assert found["first"].untyped_storage().data_ptr() != found["last"].untyped_storage().data_ptr()


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


@pytest.fixture
def file_limit() -> Iterator[None]:
    """No file can be larger than 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("file_limit")
def test_the_system_s_error_is_reported(tmp_path: Path) -> None:
    """PyTorch's own error is about a position in the file."""
    with pytest.raises(ConfigError, match=r"^output=.*w\.pth: cannot be written .*File too large.*raise the limit"):
        write_torch(tmp_path / "w.pth", {"large": torch.zeros(1_000_000)})
    assert not list(tmp_path.iterdir())
