"""Builds the parts that a YAML names by `_target_`, with every argument checked against the target's signature."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from vdtrain.errors import ConfigError, one_line


def instantiate(specification: Mapping[str, Any], setting: str, **arguments: Any) -> Any:
    """Call the object that `specification["_target_"]` names with the other entries and `arguments`.

    Raises:
        ConfigError: no such target, or an unknown or a missing argument; the error names `setting`.
    """
    target, options = find_target(specification, setting)
    given = [key for key in options if key in arguments]
    if given:
        raise ConfigError(f"{setting}.{given[0]}={options[given[0]]}: follows from other settings; leave it out")
    name, parameters = specification["_target_"], inspect.signature(target).parameters
    try:
        inspect.signature(target).bind(**arguments, **options)
    except TypeError as error:
        raise ConfigError(f"{setting}: {error}; {name} takes {', '.join(parameters)}") from error
    return target(**arguments, **options)


def takes(specification: Mapping[str, Any], setting: str, argument: str) -> bool:
    """Whether the object that `specification["_target_"]` names takes an argument.

    Raises:
        ConfigError: no such target, or an entry that is not an argument of it.
    """
    parameters = inspect.signature(find_target(specification, setting)[0]).parameters
    return argument in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def find_target(specification: Mapping[str, Any], setting: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The object that `specification["_target_"]` names, imported but not called, and the other entries.

    Raises:
        ConfigError: no such target, or an entry that is not an argument of it.
    """
    options = {key: value for key, value in specification.items() if key != "_target_"}
    name = specification.get("_target_")
    module, _, attribute = str(name).rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ConfigError(
            f"{setting}._target_={name}: cannot be imported ({one_line(error)}); "
            "write package.module.Name, with its folder on PYTHONPATH"
        ) from error
    parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [key for key in options if key not in parameters]
    if unknown and not takes_any:
        raise ConfigError(f"{setting}.{unknown[0]}: {name} takes no such argument; it takes {', '.join(parameters)}")
    return target, options
