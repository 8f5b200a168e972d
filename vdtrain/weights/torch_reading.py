"""Reads the tensors of a file by `torch.save` without running code from it.

A pickle builds objects by calling classes and functions by name. Here each name becomes one of three things. Names that
rebuild tensors do that. Names of the standard library that can act raise an error. All others, such as NumPy scalars or
a trainer's settings and callbacks, become placeholders, which keep nothing and do nothing.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vdtrain.models.frozen_weights import WeightsError

# Keys under which training scripts save a state dict, in order of preference; EMA weights come last.
WRAPPERS = (
    *("state_dict", "module", "model", "net", "model_state_dict", "params", "weights"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema"),
)
PATHS = {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"}
# What settings and counters are made of. Everything else in the standard library is refused.
DATA = {
    "argparse": {"Namespace"},
    "array": {"_array_reconstructor", "array"},
    "builtins": {
        *("bool", "bytearray", "bytes", "complex", "dict", "ellipsis", "Ellipsis", "float", "frozenset", "int"),
        *("list", "NoneType", "object", "range", "set", "slice", "str", "tuple", "type"),
    },
    "collections": {"ChainMap", "Counter", "OrderedDict", "UserDict", "UserList", "defaultdict", "deque"},
    "copyreg": {"_reconstructor", "__newobj__", "__newobj_ex__"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "functools": {"partial"},
    "pathlib": PATHS,
    # Python 3.13 has this module.
    "pathlib._local": PATHS,
    "io": {"BytesIO"},
    "_io": {"BytesIO"},
    "re": {"_compile"},
    "types": {"GenericAlias", "MappingProxyType", "SimpleNamespace"},
    "uuid": {"UUID", "SafeUUID"},
    "_codecs": {"encode"},
}
# A tensor by `expand` has more values than its file, which reading them would make memory for.
EXPANDED_BYTES = 1 << 26
# Modules of the standard library that only describe.
DESCRIPTIONS = {"typing", "numbers"}


class _Fixed(type):
    """The type of classes that a pickle cannot change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"sets {name} of a class")


class Placeholder(metaclass=_Fixed):
    """Stands for an object that weights do not need. Nothing that a pickle does with it has an effect."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> Placeholder:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Placeholder:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    extend = add = append


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse tuples in tuples: a small file can have one whose hash takes hours."""
    for key in keys:
        if isinstance(key, tuple | frozenset) and any(isinstance(each, tuple | frozenset) for each in key):
            raise pickle.UnpicklingError("a key is a tuple in a tuple")


class _Names(dict[Any, Any], metaclass=_Fixed):
    """A mapping of any kind, without its attributes and its default factory."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        for given in arguments:
            if isinstance(given, list | dict):
                pairs = [tuple(each) for each in (given if isinstance(given, list) else given.items())]
                _check_keys(pair[0] for pair in pairs if pair)
                self.update(pairs)

    def __setstate__(self, state: Any) -> None:
        pass


class _Function:
    """A function without attributes: a pickle can call it but not change it."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"sets {name} of a function")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("sets the state of a function")


class _Bytes:
    """The kind of storage whose dtype is given elsewhere."""

    __slots__ = ()
    dtype = torch.uint8


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A tensor without requires_grad, hooks and metadata."""
    made: Tensor = torch._utils._rebuild_tensor(storage, offset, size, stride)
    if made.nbytes > max(made.untyped_storage().nbytes(), EXPANDED_BYTES):
        raise pickle.UnpicklingError("a tensor repeats its values")
    return made


# A parameter is its tensor; what else is kept with it is dropped.
_PARAMETER = _Function(lambda data, *_: data)
KNOWN: dict[str, Any] = {
    "collections.OrderedDict": _Names,
    "collections.defaultdict": _Names,
    "torch.storage.UntypedStorage": _Bytes(),
    "torch.Size": _Function(lambda *sizes: torch.Size(*sizes)),
    "torch._utils._rebuild_tensor": _Function(_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch._utils._rebuild_parameter": _PARAMETER,
    "torch._utils._rebuild_parameter_with_state": _PARAMETER,
    "torch.nn.parameter.Parameter": _PARAMETER,
    # A tensor of a subclass or with attributes becomes a plain tensor.
    "torch._tensor._rebuild_from_type_v2": _Function(lambda rebuild, kind, arguments, state: rebuild(*arguments)),
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}


class _RefusedError(Exception):
    """A pickle uses a name that is refused."""


def _guarded(code: bytes, keys: slice) -> Callable[[Any], None]:
    """The action of an opcode that hashes those items of the stack."""
    load = PLAIN[code[0]]

    def checked(unpickler: Any) -> None:
        _check_keys(unpickler.stack[keys])
        load(unpickler)

    return checked


# In Python, as the one in C makes a list of any length that a file names.
PythonUnpickler: Any = vars(pickle)["_Unpickler"]
PLAIN: dict[int, Callable[[Any], None]] = PythonUnpickler.dispatch
HASHING = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(None, None, 2),
    pickle.DICT: slice(None, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}


class _Unpickler(PythonUnpickler):  # type: ignore[misc]
    # torch.save does not use BYTEARRAY8, which makes memory of any size.
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code: load for code, load in PLAIN.items() if code != pickle.BYTEARRAY8[0]},
        **{code[0]: _guarded(code, keys) for code, keys in HASHING.items()},
    }

    def find_class(self, module: str, name: str) -> Any:
        # PyTorch's pickle protocol uses the names of Python 2.
        module, name = _compat_pickle.NAME_MAPPING.get(
            (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        )
        if (known := KNOWN.get(f"{module}.{name}")) is not None:
            return known
        top = module.partition(".")[0]
        data = name in DATA.get(module, ()) or module in DESCRIPTIONS
        if not all(word.isidentifier() for word in f"{module}.{name}".split(".")) or (
            top in sys.stdlib_module_names and not data
        ):
            raise _RefusedError(f"{module}.{name}")
        return _Fixed(name.rpartition(".")[2], (Placeholder,), {"__slots__": (), "__module__": module})


class _Pickles:
    """The parts of a pickle module that `torch.load` uses."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: io.BufferedIOBase, **arguments: Any) -> Any:
        return _Unpickler(file, **arguments).load()


def read_state_dict(path: Path, place: str) -> dict[str, Tensor]:
    """The tensors of a PyTorch file by name, out of their wrappers.

    Tensors in a file by PyTorch 1.6 or later stay in the file until their values are used.

    Raises:
        WeightsError: the file is truncated, is not a state dict, or uses a refused name; the message has the name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: Any = torch.load(
                path,
                "cpu",
                pickle_module=_Pickles,
                weights_only=False,
                mmap=_is_archive(path, place),
                encoding="latin1",
            )
    except _RefusedError as refused:
        raise WeightsError(
            f"{place}: {path.name} cannot be read as plain tensors: it calls {str(refused)[:120]}, and no code of a "
            "file is run; if you trust the file, convert it to safetensors"
        ) from refused
    except WeightsError:
        raise
    # A damaged pickle can raise any error.
    except Exception as error:
        raise WeightsError(f"{place}: {path.name} is truncated or damaged; fetch it again") from error
    state = _unwrapped(content)
    if state is None:
        found = [content] if not isinstance(content, Mapping) else content.values()
        kinds = ", ".join(dict.fromkeys(map(_kind, found)))
        raise WeightsError(
            f"{place}: {path.name} holds no tensors by name{kinds and f', only {kinds[:120]}'}; "
            "give the state dict of a model"
        )
    for name, value in state.items():
        if isinstance(value, Placeholder) and re.search("tensor|parameter", _kind(value), re.IGNORECASE):
            raise WeightsError(f"{place}: {name} is a {_kind(value)}; give weights as plain tensors, not quantised")
    return {str(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _unwrapped(content: Any, depth: int = 4) -> Mapping[Any, Any] | None:
    """The innermost mapping with tensors, found by the names of wrappers."""
    if not isinstance(content, Mapping) or not depth:
        return None
    inner = (_unwrapped(content.get(name), depth - 1) for name in WRAPPERS)
    found = next((each for each in inner if each is not None), None)
    return content if found is None and any(isinstance(each, Tensor) for each in content.values()) else found


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}".lstrip("_")


def _is_archive(path: Path, place: str) -> bool:
    """Whether a file is a zip archive of tensors, as PyTorch writes since version 1.6."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return False
    if not zipfile.is_zipfile(path):
        raise WeightsError(f"{place}: {path.name} is truncated or damaged; fetch it again")
    try:
        # PyTorch recognises a program by these names.
        records = torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError as error:
        raise WeightsError(
            f"{place}: {path.name} is an archive of other files, or damaged; unpack it, or fetch it again"
        ) from error
    if "constants.pkl" in records:
        raise WeightsError(
            f"{place}: {path.name} is a TorchScript program, and no code of a file is run; give the same weights "
            "as safetensors or as a state dict (for CLIP: Hugging Face's openai/clip-vit-large-patch14)"
        )
    return True
