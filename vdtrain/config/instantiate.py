"""Builds the parts that a YAML names by `_target_`, with every argument checked against the target's signature.

Somebody else may have written the configuration of a checkpoint, so nothing in it is executed. A part is built only if
its class is in `PARTS`, or in a module that the command line trusts. References such as `${runs_dir}` are followed
within the configuration itself. Other interpolations, which read the environment or call functions, stay text, and no
part may hold one.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vdtrain.config.schema import ModelConfig
from vdtrain.errors import ConfigError, one_line, printable


def instantiate(specification: Mapping[str, Any], setting: str, **arguments: Any) -> Any:
    """Call the object that `specification["_target_"]` names with the other entries and `arguments`.

    Raises:
        ConfigError: no such target, an unknown or a missing argument, or a ValueError of the target itself; the error
            names `setting`.
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
    try:
        return target(**arguments, **options)
    except ValueError as error:
        # Classes derived from it are errors of ours.
        if type(error) is not ValueError:
            raise
        raise ConfigError(f"{setting}: {one_line(error)}; correct its arguments") from error


def takes(specification: Mapping[str, Any], setting: str, argument: str) -> bool:
    """Whether the object that `specification["_target_"]` names takes an argument.

    Raises:
        ConfigError: no such target, or an entry that is not an argument of it.
    """
    return _takes(find_target(specification, setting)[0], argument)


def _takes(target: Callable[..., Any], argument: str) -> bool:
    parameters = inspect.signature(target).parameters
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
    if unknown := [key for key in options if not _takes(target, key)]:
        known = ", ".join(inspect.signature(target).parameters)
        raise ConfigError(f"{setting}.{unknown[0]}: {name} takes no such argument; it takes {known}")
    return target, options


# The classes of this package, by the part of a modality that they can be.
PARTS = {
    "data_layers": ("vdtrain.models.image_layers.ImageDataLayers", "vdtrain.models.text_layers.TextDataLayers"),
    "context_layers": ("vdtrain.models.context_layers.ContextLayers",),
    "vae": ("vdtrain.models.image_vae.ImageVAE", "vdtrain.models.optimus.Optimus"),
    "context_encoder": ("vdtrain.models.clip.ClipImageContext", "vdtrain.models.clip.ClipTextContext"),
}
REFERENCE = re.compile(r"\$\{(\.*)(\w+(?:\.\w+)*)\}")
INTERPOLATION = "${"
Schema = TypeVar("Schema")
# A configuration of ours has some 20 kB and 500 values, in 10 levels.
FILE_BYTES, SIZE, LEVELS = 1_000_000, 1_000_000, 50
# Characters of a whole number.
NUMBER = 100


def read_yaml(path: Path) -> Any:
    """The content of a YAML file: plain values, tables and lists.

    Raises:
        ValueError: it is not YAML, is larger than `FILE_BYTES`, or has aliases, with which a small file grows large.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(FILE_BYTES + 1)
    if len(data) > FILE_BYTES:
        raise ValueError(f"it has more than {FILE_BYTES:,} bytes")
    try:
        return yaml.load(data, _PlainLoader)
    # A value that its own tag does not fit, such as `!!bool x`, is an error of many kinds.
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(one_line(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def resolved(container: Any) -> Any:
    """A copy of a configuration with its references replaced by what they refer to.

    Args:
        container: unresolved, as JSON holds it.

    Raises:
        ValueError: a reference leads to itself, or the copy would be larger than `SIZE`.
    """
    return _Resolver(container).value(container, (), 0)


def recorded_model(container: Any) -> ModelConfig:
    """The model of a configuration; `check_parts` comes before any of its parts is built.

    Args:
        container: of the model, see `resolved`.

    Raises:
        ValueError: it is not a model's, or it has an interpolation; the message names the setting.
    """
    return recorded(ModelConfig, "model", container)


def recorded(schema: type[Schema], name: str, container: Any) -> Schema:
    """A part of a configuration as its schema has it.

    Args:
        container: of the part, see `resolved`.

    Raises:
        ValueError: it does not fit the schema, or it has an interpolation; the message names the setting.
    """
    for setting, value in _texts(name, container):
        if INTERPOLATION in value:
            raise ValueError(
                f"{printable(f'{setting[:200]}={value[:100]}')}: interpolations of a recorded configuration are not "
                "resolved; write the value"
            )
    if not isinstance(container, Mapping):
        raise ValueError(f"{name}: no table of settings")
    try:
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), container))
    except OmegaConfBaseException as error:
        raise ValueError(f"{name}: {one_line(error)}") from error
    assert isinstance(found, schema)
    return found


def check_parts(model: ModelConfig, trust: Sequence[str], source: str) -> None:
    """Refuse a model with a part whose class is neither this package's own nor trusted.

    Args:
        trust: modules whose classes may be called, with the modules below them.
        source: setting and value that the model comes from.

    Raises:
        ConfigError: it names the part, and the setting that allows it.
    """
    for name, part, target in _own_classes(model):
        module = target.rpartition(".")[0]
        if not any(f"{module}.".startswith(f"{each}.") for each in trust):
            raise ConfigError(
                f"{source}: its model.modalities.{name}.{part}._target_={target[:200]} is no {part} of this package, "
                f"and calling it may run anything; if you trust who made it, add 'trust=[{module[:200]}]'"
            )


def import_parts(model: ModelConfig) -> None:
    """Import the modules outside `PARTS` that a model's parts are from, after `check_parts`.

    Raises:
        ConfigError: one cannot be imported.
    """
    for name, part, target in _own_classes(model):
        find_target({"_target_": target}, f"model.modalities.{name}.{part}")


def own_modules(model: ModelConfig) -> list[str]:
    """The modules outside `PARTS` that a model's parts are from: a command on its checkpoint has to trust them."""
    return sorted({target.rpartition(".")[0] for _, _, target in _own_classes(model)})


def _own_classes(model: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """Modality, part and class of the parts that are not this package's own."""
    for name, modality in model.modalities.items():
        for part, known in PARTS.items():
            if (target := str(getattr(modality, part).get("_target_"))) not in known:
                yield name, part, target


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """All values of a configuration by full name; phases by index, other lists whole."""
    prefix = f"{name}." if name else ""
    # An empty table has no values.
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from leaves(f"{prefix}{key}", entry)
    elif name == "stage.phases" and isinstance(value, list):
        for number, entry in enumerate(value):
            yield from leaves(f"{prefix}{number}", entry)
    else:
        yield name, value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings that differ between two configurations, each with [what it was, what it is]; None is unset."""
    was, becomes = dict(leaves("", old)), dict(leaves("", new))
    names = [*becomes, *(name for name in was if name not in becomes)]
    return {name: [was.get(name), becomes.get(name)] for name in names if was.get(name) != becomes.get(name)}


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Long ones in base 60, such as 1:00:00, would take hours."""
        if len(str(node.value)) > NUMBER:
            raise yaml.YAMLError("a number has too many digits")
        found: int = super().construct_yaml_int(node)
        return found


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


class _Resolver:
    def __init__(self, root: Any) -> None:
        self.root, self.left = root, SIZE

    def value(self, value: Any, place: tuple[Any, ...], level: int) -> Any:
        """A copy of a value at a place, with references replaced."""
        self.left -= len(value) + 1 if isinstance(value, str) else 1
        if level > LEVELS or self.left < 0:
            raise ValueError(f"{'.'.join(map(str, place))}: the configuration grows without end")
        if isinstance(value, Mapping):
            return {str(key): self.value(entry, (*place, key), level + 1) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.value(entry, (*place, number), level + 1) for number, entry in enumerate(value)]
        if not isinstance(value, str) or INTERPOLATION not in value:
            return value
        if (whole := REFERENCE.fullmatch(value)) is not None:
            return self._target(whole, place, level)
        return REFERENCE.sub(lambda match: str(self._target(match, place, level)), value)

    def _target(self, match: re.Match[str], place: tuple[Any, ...], level: int) -> Any:
        dots, names = len(match[1]), match[2].split(".")
        path = [*(place[: len(place) - dots] if dots else ()), *names]
        found = self.root
        for name in path:
            found = found.get(name, self) if isinstance(found, Mapping) else self
        return match[0] if found is self else self.value(found, tuple(path), level + 1)


def _texts(name: str, value: Any) -> list[tuple[str, str]]:
    """All texts of a configuration, keys included, by full name."""
    if isinstance(value, Mapping):
        entries = [(f"{name}.{key}", entry) for key, entry in value.items()]
        return [(name, str(key)) for key in value] + [text for entry in entries for text in _texts(*entry)]
    if isinstance(value, list):
        return [text for number, entry in enumerate(value) for text in _texts(f"{name}.{number}", entry)]
    return [(name, value)] if isinstance(value, str) else []
