"""Builds the parts that a YAML names by `_target_`, with every argument checked against the target's signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object

from vdtrain.compose import ConfigError


def instantiate(specification: Mapping[str, Any], setting: str, **arguments: Any) -> Any:
    """Call the object that `specification["_target_"]` names with the other entries and `arguments`.

    Raises:
        ConfigError: no such target, or an argument that it does not take or misses; `setting` names the place.
    """
    options = {key: value for key, value in specification.items() if key != "_target_"}
    name = specification.get("_target_")
    try:
        target = get_object(str(name))
    except Exception as error:
        raise ConfigError(f"{setting}._target_={name}: cannot be imported ({' '.join(str(error).split())})") from error
    parameters = inspect.signature(target).parameters
    unknown = [key for key in options if key not in parameters]
    if unknown:
        raise ConfigError(f"{setting}.{unknown[0]}: {name} takes no such argument; it takes {', '.join(parameters)}")
    try:
        inspect.signature(target).bind(**arguments, **options)
    except TypeError as error:
        raise ConfigError(f"{setting}: {error}; {name} takes {', '.join(parameters)}") from error
    return target(**arguments, **options)
