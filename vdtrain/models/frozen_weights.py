"""Reads the weights and tokenizers of the frozen parts from safetensors and JSON files, never from a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from vdtrain.errors import ConfigError
from vdtrain.files import FileRecord

ASSET = "asset:"
ASSETS = Path(__file__).resolve().parent.parent / "assets"
# An argument with one of these endings names a file.
FILES = (".safetensors", ".json")
LISTED_KEYS = 5

Module = TypeVar("Module", bound=nn.Module)
_shared_modules: ContextVar[dict[str, Any] | None] = ContextVar("shared_modules", default=None)
_read_files: ContextVar[bool] = ContextVar("read_files", default=True)


class WeightsError(ConfigError):
    """Weights or a tokenizer are missing, damaged or belong to another model. The message is one line.

    The message may quote names from a file, so unprintable characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(each if each.isprintable() else ascii(each)[1:-1] for each in message))


@contextmanager
def _within(variable: ContextVar[Any], value: object) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def shared_loading() -> AbstractContextManager[None]:
    """Inside, parts with the same weights share one module; outside, each part has its own."""
    return _within(_shared_modules, {})


def without_weights() -> AbstractContextManager[None]:
    """Inside, `load_weights` reads nothing: a part that is only measured needs no files."""
    return _within(_read_files, False)


def reads_weights() -> bool:
    """False inside `without_weights`."""
    return _read_files.get()


def shared_module(key: str, build: Callable[[], Module]) -> Module:
    """The module that the current `shared_loading` has for `key`, else a new one."""
    modules = _shared_modules.get()
    if modules is None:
        return build()
    if key not in modules:
        modules[key] = build()
    module: Module = modules[key]
    return module


def locate(path: str, setting: str) -> Path:
    """Resolve a path from the configuration; "asset:tiny/x" is the package's own `vdtrain/assets/tiny/x`.

    Args:
        setting: name of the setting that holds the path.

    Raises:
        WeightsError: the file does not exist.
    """
    found = ASSETS / path.removeprefix(ASSET) if path.startswith(ASSET) else Path(path).expanduser()
    if not found.is_file():
        remedy = "`make frozen` makes it" if path.startswith(ASSET) else "`vdtrain weights import` makes it"
        raise WeightsError(f"{setting}={path}: no such file; {remedy}, or set {setting} to an existing file")
    return found


def names_file(value: Any) -> bool:
    """Whether an argument of a part names a file with its weights or its tokenizer."""
    return isinstance(value, str) and (value.startswith(ASSET) or Path(value).suffix in FILES)


def named_files(specification: Mapping[str, Any], setting: str) -> dict[str, str]:
    """The files of a part, by the setting that names each.

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
    """16 hexadecimal digits that differ if an argument differs, or the contents of a file that an argument names.

    Args:
        specification: a `_target_` with its arguments.

    Raises:
        WeightsError: a file does not exist, or the part has random weights, which differ from run to run.
    """
    if "weights" in specification and specification["weights"] is None:
        raise WeightsError(f"{setting}.weights=null: random weights differ from run to run; give a weights file")

    def content(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: content(f"{name}.{key}", entry) for key, entry in value.items()}
        return FileRecord.of(locate(value, name)).sha256 if names_file(value) else value

    described = json.dumps(content(setting, specification), sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def load_tokenizer(path: str, setting: str) -> Tokenizer:
    """Read a `tokenizers` JSON file. The tokenizer neither pads nor cuts.

    Raises:
        WeightsError: the file is missing, or is not a tokenizer.
    """
    file = locate(path, setting)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise WeightsError(f"{setting}={path}: not a `tokenizers` file ({error}); give a tokenizer.json") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_weights(module: nn.Module, path: str, setting: str) -> None:
    """Load a safetensors file into a module; values are cast to the dtype of the parameters.

    The file needs tensors that share memory in the module (tied weights) only once.

    Raises:
        WeightsError: the file is missing or damaged, its keys or shapes differ from the module's, or a value is not
            finite.
    """
    if not reads_weights():
        return
    file = locate(path, setting)
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{setting}={path}: not a readable safetensors file ({error}); fetch it again") from error
    differences = compare(module.state_dict(), state)
    if differences:
        raise WeightsError(f"{setting}={path}: weights of another model: {differences}")
    if poisoned := next((name for name, tensor in state.items() if not is_finite(tensor)), None):
        raise WeightsError(f"{setting}={path}: {poisoned} holds values that are NaN or infinite; fetch it again")
    module.load_state_dict(state, strict=False)


def compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """One line on how a state dict differs from the expected one in keys and shapes; "" if it does not differ."""
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


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Both bounds are NaN if a value is NaN, and this needs no memory.
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


def untied(module: nn.Module) -> dict[str, Tensor]:
    """A state dict with every tensor once, contiguous: safetensors can hold it, and `load_weights` reads it."""
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        if not _shared(value, seen):
            state[key] = value.detach().contiguous()
            seen.add(value.data_ptr())
    return state


def freeze(module: nn.Module) -> None:
    """Put a module in evaluation mode and switch its gradients off."""
    module.eval().requires_grad_(False)


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's first floating-point parameter."""
    parameter = next(p for p in module.parameters() if p.is_floating_point())
    return parameter.device, parameter.dtype


def _shared(value: Tensor, pointers: set[int]) -> bool:
    # Empty tensors and those on the meta device have pointer 0.
    return value.data_ptr() != 0 and value.data_ptr() in pointers


def _listed(keys: list[str]) -> str:
    more = len(keys) - LISTED_KEYS
    return ", ".join(keys[:LISTED_KEYS]) + (f" and {more} more" if more > 0 else "")
