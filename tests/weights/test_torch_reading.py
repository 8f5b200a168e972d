"""Files of PyTorch as they were published: what training left in them is passed over, and nothing in them is run."""

from __future__ import annotations

import argparse
import collections
import copyreg
import datetime
import functools
import io
import pickle
import sys
import tarfile
import types
import typing
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights.tensor_files import open_tensors

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.arange(2.0).half()}


@contextmanager
def packages(*names: str, bases: tuple[type, ...] = (object,)) -> Iterator[list[Any]]:
    """Classes under the names that published files have, importable inside alone."""
    modules: dict[str, types.ModuleType] = {}
    made = []
    for name in names:
        module, _, last = name.rpartition(".")
        for parent in accumulate(module.split("."), "{}.{}".format):
            if parent == module or parent not in sys.modules:
                modules.setdefault(parent, types.ModuleType(parent))
        made.append(type(last, bases, {"__module__": module}))
        setattr(modules[module], last, made[-1])
    with patch.dict(sys.modules, modules):
        yield made


class Call:
    """An object whose pickle is a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


def check(file: Path, expected: dict[str, Tensor] = TENSORS) -> None:
    found = open_tensors(file, "path")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert not found[name].requires_grad


def write(folder: Path, content: Any, legacy: bool = False, protocol: int = 2) -> Path:
    file = folder / "w.ckpt"
    torch.save(content, file, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return file


CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


def training_state() -> dict[str, Any]:
    """What a trainer keeps beside the weights, of classes that are installed here."""
    settings = OmegaConf.create({"lr": 1e-4, "layers": [1, 2], "name": "${lr}", "nested": {"path": "x"}})
    rates = collections.defaultdict(list, {"lr": [np.float64(1e-4)]})
    return {
        "lr_schedulers": [
            {"last_lr": [np.float64(1e-4), np.float32(2e-4)], "base": np.arange(3.0), "d": np.dtype("f4")}
        ],
        "hyper_parameters": {"config": settings, "args": argparse.Namespace(lr=np.float64(1), path=Path("/data"))},
        "rates": rates,
        "names": np.str_("x"),
        "when": datetime.datetime(2022, 8, 22),
        "kinds": (int, dict, typing.Any, torch.float16, torch.device("cuda:0"), torch.Size([2])),
        "more": [collections.deque([1]), {1, 2}, frozenset({3}), 1j, bytearray(b"x"), b"x", slice(1), range(3)],
        "partial": functools.partial(dict, a=1),
        "space": types.SimpleNamespace(a=1),
        "buffer": io.BytesIO(b"x"),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_training_left_is_passed_over(tmp_path: Path, legacy: bool, protocol: int) -> None:
    state = {name: nn.Parameter(tensor) for name, tensor in TENSORS.items()}
    ordered = collections.OrderedDict(state)
    ordered._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    check(write(tmp_path, {"state_dict": ordered, "global_step": 3, **training_state()}, legacy, protocol))


PUBLISHED = [
    CALLBACK,
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "easydict.EasyDict",
    "yacs.config.CfgNode",
    "ldm.modules.ema.Settings",
    "transformers.training_args.TrainingArguments",
    "pathlib._local.PosixPath",
]


@pytest.mark.parametrize("base", [object, dict, list])
def test_classes_that_are_not_installed(tmp_path: Path, base: type) -> None:
    with packages(*PUBLISHED, bases=(base,)) as classes:
        objects = [kind() for kind in classes]
        for each in objects:
            each.learning_rate = np.float64(1e-4)
            if base is dict:
                each["lr"] = 1
            if base is list:
                each.append(1)
        file = write(
            tmp_path, {"state_dict": TENSORS, "callbacks": {classes[0]: {"best": torch.ones(1)}}, "all": objects}
        )
    assert not any(name.split(".")[0] in sys.modules for name in PUBLISHED[:-1] if "transformers" not in name)
    check(file)


@pytest.mark.parametrize("package", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_by_both_of_its_names(tmp_path: Path, package: str) -> None:
    """Version 2 of NumPy moved what its pickles call; the bytes of a number go through `_codecs.encode`."""
    number = np.float64(1e-4)
    content = write(tmp_path, {"state_dict": TENSORS, "rates": [number, np.arange(2.0)]}, protocol=2).read_bytes()
    assert b"_codecs\nencode" in content
    assert b"numpy._core.multiarray\nscalar" in content
    calls = tmp_path / "calls.ckpt"
    with packages(f"{package}.scalar", f"{package}._reconstruct") as (scalar, reconstruct):
        torch.save(
            {
                "state_dict": TENSORS,
                "rates": [Call(scalar, np.dtype("f8"), b"\x00\xff"), Call(reconstruct, np.ndarray)],
            },
            calls,
        )
    assert package.encode() in calls.read_bytes()
    check(calls)


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model", "net", "ema"])
@pytest.mark.parametrize("outer", [None, "module", "model"])
def test_wrappers(tmp_path: Path, wrapper: str, outer: str | None) -> None:
    content: dict[str, Any] = {wrapper: TENSORS, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}
    check(write(tmp_path, content if outer is None else {outer: content, "step": 1}))


def test_trained_weights_come_before_averaged_ones(tmp_path: Path) -> None:
    averaged = {name: tensor + 1 for name, tensor in TENSORS.items()}
    check(write(tmp_path, {"ema": averaged, "state_dict_ema": averaged, "model": TENSORS}))


def test_tensors_of_other_kinds_of_storage(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    expected = {"row": whole[1], "column": whole.T, "tied": whole, "bf16": torch.ones(2).bfloat16(), "empty": whole[:0]}
    check(write(tmp_path, expected), expected)
    check(write(tmp_path, expected, legacy=True), expected)
    labelled = whole.clone()
    labelled.note = "of a parameter with attributes"  # type: ignore[attr-defined]
    check(write(tmp_path, {"w": labelled}), {"w": whole})


class Touch:
    """Makes a file if its pickle is run, in the ways in which a pickle can."""

    def __init__(self, way: str, file: Path) -> None:
        self.way, self.file = way, file

    def __reduce__(self) -> Any:
        import os
        import subprocess

        return {
            "method": (Path.touch, (self.file,)),
            "eval": (eval, (f"open({str(self.file)!r}, 'w')",)),
            "system": (os.system, (f"touch {self.file}",)),
            "process": (subprocess.Popen, (["touch", str(self.file)],)),
            "constructor": (copyreg.constructor, (print,)),
        }[self.way]


NAMED = {
    "method": r"builtins\.getattr",
    "eval": r"builtins\.eval",
    "system": r"posix\.system",
    "process": r"subprocess\.Popen",
    "constructor": r"copyreg\.constructor",
}


@pytest.mark.parametrize("way", NAMED)
@pytest.mark.parametrize("form", ["plain", "zip", "legacy"])
def test_code_is_refused_by_its_name(tmp_path: Path, way: str, form: str) -> None:
    content = {"state_dict": TENSORS, "callbacks": [Touch(way, tmp_path / "ran")]}
    if form == "plain":
        file = tmp_path / "w.ckpt"
        file.write_bytes(pickle.dumps({"callbacks": content["callbacks"]}, protocol=2))
    else:
        file = write(tmp_path, content, form == "legacy")
    with pytest.raises(WeightsError) as refused:
        open_tensors(file, "path")
    if form == "plain":
        # PyTorch looks for its own mark before anything else.
        assert "w.ckpt" in str(refused.value)
    assert str(refused.value).count("\n") == 0
    assert refused.match(rf"path=.*w\.ckpt cannot be read as plain tensors: it calls {NAMED[way]}.*convert it")
    assert not (tmp_path / "ran").exists()


def raw_global(name: bytes) -> bytes:
    return b"\x80\x02c" + name + b"\n."


@pytest.mark.parametrize(
    "name",
    [b"\x1b[31mevil\nclass", b"pathlib\nPath.touch", b"__builtin__\neval", b"commands\ngetoutput", b"a b\nc"],
)
def test_names_cannot_steer_a_terminal(tmp_path: Path, name: bytes) -> None:
    file = tmp_path / "w.ckpt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", raw_global(name))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(WeightsError) as refused:
        open_tensors(file, "path")
    assert str(refused.value).isprintable()
    assert "it calls" in str(refused.value)


def test_a_pickle_cannot_change_what_reads_it(tmp_path: Path) -> None:
    """A BUILD of a function or a class would set its attributes."""
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"numpy\nndarray"):
        for state in (
            b"}X\x01\x00\x00\x00aK\x01s",
            b"N}X\x04\x00\x00\x00_calK\x01s\x86",
            b"N}X\x01\x00\x00\x00aK\x01s\x86",
        ):
            file = tmp_path / "w.ckpt"
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("archive/data.pkl", b"\x80\x02c" + name + b"\n" + state + b"b.")
                archive.writestr("archive/version", "3\n")
            with pytest.raises(WeightsError, match=r"truncated or damaged|holds no tensors"):
                open_tensors(file, "path")
    check(write(tmp_path, TENSORS))


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    with pytest.raises(WeightsError, match=r"w\.q is a torch\._utils\._rebuild_qtensor; give weights as plain tensors"):
        open_tensors(write(tmp_path, {"w.q": quantised, **TENSORS}), "path")
    with pytest.raises(WeightsError, match=r"holds no tensors by name, only torch\.nn\.modules\.linear\.Linear;"):
        open_tensors(write(tmp_path, nn.Linear(1, 1)), "path")
    with pytest.raises(WeightsError, match=r"a\.eight is a torch\._utils\._rebuild_tensor_v3; .*not quantised"):
        open_tensors(write(tmp_path, {"a.eight": torch.ones(2).to(torch.float8_e4m3fn), **TENSORS}), "path")


def test_archives_of_other_things(tmp_path: Path) -> None:
    file = tmp_path / "w.ckpt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "weights")
    with pytest.raises(WeightsError, match=r"is an archive of other files, or damaged"):
        open_tensors(file, "path")
    (tmp_path / "storages").write_bytes(b"x")
    for name in ("storages", "\x80storages"):
        with tarfile.open(file, "w", encoding="latin1", format=tarfile.GNU_FORMAT) as tar:
            tar.add(tmp_path / "storages", name)
        with pytest.raises(WeightsError, match=r"is a tar archive; unpack it"):
            open_tensors(file, "path")
