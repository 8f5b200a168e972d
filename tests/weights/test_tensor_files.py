"""Weights files are opened without reading them, and what is none of them is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights.exports import write_torch
from vdtrain.weights.folder import write_safetensors
from vdtrain.weights.tensor_files import LazyTensors, open_tensors

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.half": torch.arange(4.0).half(),
    "a.bfloat": torch.arange(4.0).bfloat16(),
    "steps": torch.tensor(7),
}


def equal(found: LazyTensors, expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def write(file: Path, content: object = TENSORS, legacy: bool = False) -> Path:
    if file.suffix == ".safetensors":
        assert isinstance(content, dict)
        save_file(content, file)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.ckpt", "w.bin", "w.pt", "no_ending"])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_kind_of_file_gives_its_tensors(tmp_path: Path, name: str, legacy: bool) -> None:
    found = open_tensors(write(tmp_path / name, legacy=legacy), "path")
    assert equal(found, TENSORS)
    assert found.meta()["a.half"].dtype == torch.float16
    assert found.meta()["a.weight"].shape == (2, 3)
    assert found.nbytes == 24 + 8 + 8 + 8


def test_a_state_dict_is_unwrapped(tmp_path: Path) -> None:
    file = write(tmp_path / "w.ckpt", {"state_dict": TENSORS, "global_step": 3, "lr": torch.ones(1)})
    assert equal(open_tensors(file, "path"), TENSORS)


def test_tensors_are_read_on_access_alone(tmp_path: Path) -> None:
    reads: list[str] = []
    lazy = open_tensors(write(tmp_path / "w.safetensors"), "path")
    for name, entry in lazy.entries.items():
        read = entry.read
        object.__setattr__(entry, "read", lambda name=name, read=read: (reads.append(name), read())[1])
    assert lazy.meta().keys() == TENSORS.keys()
    renamed = lazy.renamed({"first": "a.weight", "second": "a.weight", "third": "steps"}).cast(torch.float16)
    assert renamed.meta()["first"].dtype == torch.float16
    assert renamed.meta()["third"].dtype == torch.int64
    assert not reads
    assert torch.equal(renamed["second"], TENSORS["a.weight"].half())
    assert reads == ["a.weight"]
    with pytest.raises(KeyError):
        lazy.renamed({"first": "absent"})


def shards(folder: Path) -> Path:
    """Two shards and their index."""
    folder.mkdir()
    names = {name: f"model-{number}.safetensors" for number, name in enumerate(TENSORS)}
    for name, file in names.items():
        save_file({name: TENSORS[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_shards_by_folder_or_index(tmp_path: Path) -> None:
    folder = shards(tmp_path / "w")
    assert equal(open_tensors(folder, "path"), TENSORS)
    assert equal(open_tensors(folder / "model.safetensors.index.json", "path"), TENSORS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_map": {"a": "../other.safetensors"}}, "is outside the folder"),
        ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors is missing"),
        ({"weight_map": {"b": "model-0.safetensors"}}, "b is not in model-0.safetensors"),
        ({"weights": {}}, "is not an index of weights"),
        ([], "is not an index of weights"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, change: object, message: str) -> None:
    folder = shards(tmp_path / "w")
    (folder / "model.safetensors.index.json").write_text(json.dumps(change))
    with pytest.raises(WeightsError, match=message):
        open_tensors(folder, "path")


def test_a_folder_gives_its_plain_weights(tmp_path: Path) -> None:
    write(tmp_path / "model.bin", {"other": torch.ones(1)})
    write(tmp_path / "model.fp16.safetensors", {"other": torch.ones(1)})
    write(tmp_path / "model.safetensors")
    assert equal(open_tensors(tmp_path, "path"), TENSORS)
    write(tmp_path / "second.safetensors")
    with pytest.raises(WeightsError, match=r"holds 2 weights files \(model.safetensors, second.safetensors\)"):
        open_tensors(tmp_path, "path")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "legacy.pth"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, legacy=name == "legacy.pth")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(WeightsError, match=rf"path=.*{name} is truncated or damaged.*fetch it again"):
        open_tensors(file, "path")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ViT-L-14.pt"
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(file))
    with pytest.raises(WeightsError, match=r"is a TorchScript program.*openai/clip-vit-large-patch14"):
        open_tensors(file, "path")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"<!doctype html><html>404</html>", "is not a file of tensors"),
        (b"", "w.pth is empty; fetch it again"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_tensors(tmp_path / "w.pth", "path")


def test_nothing_to_open_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        open_tensors(tmp_path / "absent.pth", "path")
    with pytest.raises(WeightsError, match="a folder without weights"):
        open_tensors(tmp_path, "path")
    with pytest.raises(WeightsError, match="holds no tensors by name"):
        open_tensors(write(tmp_path / "w.pth", {"step": 3}), "path")
    with pytest.raises(WeightsError, match="holds no tensors by name"):
        open_tensors(write(tmp_path / "w.pth", torch.ones(2)), "path")


def test_names_of_what_wrapped_a_model_are_left_out(tmp_path: Path) -> None:
    wrapped = {"module._orig_mod.a.weight": TENSORS["a.weight"], "_orig_mod.a.half": TENSORS["a.half"]}
    wrapped["a._fsdp_wrapped_module.bfloat"] = TENSORS["a.bfloat"]
    assert equal(open_tensors(write(tmp_path / "w.pth", wrapped | {"steps": torch.tensor(7)}), "path"), TENSORS)
    with pytest.raises(WeightsError, match="holds weights twice, with and without module or _orig_mod"):
        open_tensors(write(tmp_path / "w.pth", TENSORS | wrapped), "path")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_where_they_are_read(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    tensor = torch.ones(3, 1000, dtype=dtype)
    tensor[1, 500] = value
    for name in ("w.pth", "w.safetensors"):
        found = open_tensors(write(tmp_path / name, {"a": tensor, "b": torch.ones(2), "c": torch.ones(0)}), "path")
        assert found["b"].sum() == 2
        assert not found["c"].numel()
        with pytest.raises(WeightsError, match=rf"path=.*{name}: a holds values that are NaN or infinite"):
            found["a"]


def test_the_largest_values_are_finite(tmp_path: Path) -> None:
    largest = {
        str(dtype): torch.full((4096,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float32, torch.half)
    }
    assert equal(open_tensors(write(tmp_path / "w.pth", largest), "path"), largest)


def test_links_that_lead_nowhere_and_parts_without_an_index(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(WeightsError, match=r"w\.safetensors is a link to a missing file"):
        open_tensors(tmp_path, "path")
    (tmp_path / "w.safetensors").unlink()
    for number in (1, 2):
        write(tmp_path / f"model-0000{number}-of-00002.safetensors", {str(number): torch.ones(1)})
    with pytest.raises(WeightsError, match=r"holds shards \(model-00001.*\) without their index"):
        open_tensors(tmp_path, "path")


def test_tensors_that_share_memory_are_written_each_on_its_own(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    shared = {"whole": whole, "same": whole, "row": whole[1], "column": whole[:, 1], "turned": whole.T, "all": whole[:]}
    write_safetensors(tmp_path / "w.safetensors", shared)
    assert equal(open_tensors(tmp_path / "w.safetensors", "path"), shared)
    write_torch(tmp_path / "w.pth", shared)
    assert equal(open_tensors(tmp_path / "w.pth", "path"), shared)
    with pytest.raises(OSError, match="No such file"):
        write_safetensors(tmp_path / "absent" / "w.safetensors", shared)
