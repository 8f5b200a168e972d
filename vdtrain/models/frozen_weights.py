"""Reads the weights and tokenizers of the frozen parts: safetensors and JSON, never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from vdtrain.config.compose import ConfigError
from vdtrain.files import FileRecord

ASSET = "asset:"
ASSETS = Path(__file__).resolve().parent.parent / "assets"
# Endings of arguments that name a file.
FILES = (".safetensors", ".json")
LISTED_KEYS = 5

Module = TypeVar("Module", bound=nn.Module)
_shared_modules: ContextVar[dict[str, Any] | None] = ContextVar("shared_modules", default=None)
_read_files: ContextVar[bool] = ContextVar("read_files", default=True)


class WeightsError(ConfigError):
    """Weights or tokenizer that are missing, damaged or of another model; the message is one line.

    Names out of a file that are in it cannot steer a terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(each if each.isprintable() else ascii(each)[1:-1] for each in message))


@contextmanager
def shared_loading() -> Iterator[None]:
    """Inside, parts that ask for the same weights get one and the same module; outside, each gets its own."""
    token = _shared_modules.set({})
    try:
        yield
    finally:
        _shared_modules.reset(token)


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, `load_weights` reads nothing: parts that are built only to be measured need no files."""
    token = _read_files.set(False)
    try:
        yield
    finally:
        _read_files.reset(token)


def shared_module(key: str, build: Callable[[], Module]) -> Module:
    """The module that was built for `key` in the same `shared_loading`, else a new one."""
    modules = _shared_modules.get()
    if modules is None:
        return build()
    if key not in modules:
        modules[key] = build()
    module: Module = modules[key]
    return module


def locate(path: str, setting: str) -> Path:
    """Resolve a path from the configuration; "asset:tiny/x" lies in the package's own `vdtrain/assets/tiny/x`.

    Raises:
        WeightsError: there is no such file; `setting` names the setting that holds the path.
    """
    found = ASSETS / path.removeprefix(ASSET) if path.startswith(ASSET) else Path(path).expanduser()
    if not found.is_file():
        remedy = "`make frozen` makes it" if path.startswith(ASSET) else "`vdtrain weights import` makes it"
        raise WeightsError(f"{setting}={path}: no such file; {remedy}, or set {setting} to an existing file")
    return found


def names_file(value: Any) -> bool:
    """Whether an argument of a part names a file of its weights or its tokenizer."""
    return isinstance(value, str) and (value.startswith(ASSET) or Path(value).suffix in FILES)


def named_files(specification: Mapping[str, Any], setting: str) -> dict[str, str]:
    """The files that a part is made of, by the setting that names each.

    Args:
        specification: a `_target_` with its arguments.
    """
    files: dict[str, str] = {}
    for key, value in specification.items():
        if isinstance(value, Mapping):
            files |= named_files(value, f"{setting}.{key}")
        elif names_file(value):
            files[f"{setting}.{key}"] = value
    return files


def fingerprint(specification: Mapping[str, Any], setting: str) -> str:
    """Tells parts that differ in an argument, or in the contents of a file that one names, 16 hexadecimal digits.

    Args:
        specification: a `_target_` with its arguments.

    Raises:
        WeightsError: a file is not there, or the part has random weights, which differ from run to run.
    """
    if "weights" in specification and specification["weights"] is None:
        raise WeightsError(f"{setting}.weights=null: random weights are other ones in every run; give a weights file")

    def content(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: content(f"{name}.{key}", entry) for key, entry in value.items()}
        return FileRecord.of(locate(value, name)).sha256 if names_file(value) else value

    described = json.dumps(content(setting, specification), sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def load_tokenizer(path: str, setting: str) -> Tokenizer:
    """Read a `tokenizers` JSON file.

    Raises:
        WeightsError: the file is missing or is no tokenizer.
    """
    file = locate(path, setting)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise WeightsError(f"{setting}={path}: no tokenizer of the `tokenizers` library ({error})") from error


def load_weights(module: nn.Module, path: str, setting: str) -> None:
    """Fill a module from a safetensors file; values are cast to the dtype of the parameters.

    Tensors that share memory in the module (tied weights) need to be in the file once.

    Raises:
        WeightsError: the file is missing or damaged, or its keys or shapes are not those of the module.
    """
    if not _read_files.get():
        return
    file = locate(path, setting)
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{setting}={path}: not a readable safetensors file ({error}); fetch it again") from error
    differences = compare(module.state_dict(), state)
    if differences:
        raise WeightsError(f"{setting}={path}: weights of another model: {differences}")
    module.load_state_dict(state, strict=False)


def compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Describe in one line how a state dict differs in keys and shapes from the expected one; "" if it does not."""
    present = {expected[key].data_ptr() for key in found if key in expected}
    missing = [key for key, value in expected.items() if key not in found and not _shared(value, present)]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} {list(found[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("shape", shapes)]
    return "; ".join(f"{name} {_listed(keys)}" for name, keys in parts if keys)


def untied(module: nn.Module) -> dict[str, Tensor]:
    """State dict with every tensor once, contiguous: what safetensors can hold and `load_weights` reads."""
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        if not _shared(value, seen):
            state[key] = value.detach().contiguous()
            seen.add(value.data_ptr())
    return state


def freeze(module: nn.Module) -> None:
    """Put a module in evaluation mode, without gradients."""
    module.eval().requires_grad_(False)


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module's first floating-point parameter lives, and in what precision."""
    parameter = next(p for p in module.parameters() if p.is_floating_point())
    return parameter.device, parameter.dtype


def _shared(value: Tensor, pointers: set[int]) -> bool:
    # Tensors on the meta device and empty ones all have pointer 0.
    return value.data_ptr() != 0 and value.data_ptr() in pointers


def _listed(keys: list[str]) -> str:
    more = len(keys) - LISTED_KEYS
    return ", ".join(keys[:LISTED_KEYS]) + (f" and {more} more" if more > 0 else "")
