"""What the schema knows of a setting: its type, its help, and the values that it takes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from vdtrain.config.suggestions import meant
from vdtrain.errors import ConfigError

# The key of a field's metadata.
ABOUT = "about"
LARGEST_SHOWN_INTEGER = 10**15


@dataclass(frozen=True)
class About:
    """What is known of a setting beside its type.

    Attributes:
        help: what it is; after the first "; ", what special values mean. An error about a bound prints that too.
        choices: the values that it takes; empty for any.
        least, above, most, below: bounds of a number; of a list or a table, of every number in it.
        environment: the variable that the value may come from, which an error then names.
    """

    help: str = ""
    choices: tuple[Any, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    environment: str | None = None

    @property
    def bounds(self) -> str:
        """The bounds in words, such as "at least 1"; empty without any."""
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        names = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{name} {bound}" for name, bound in names.items() if bound is not None)

    def problem(self, value: Any) -> str | None:
        """Why a value is refused; None if it is not."""
        if value is None:
            return None
        if self.choices and value not in self.choices:
            return f"choose from {', '.join(map(str, self.choices))}{meant(value, self.choices)}"
        if isinstance(value, int | float) and not self._within(value):
            _, semicolon, special = self.help.partition("; ")
            return f"must be {self.bounds}{semicolon}{special}"
        return None

    def _within(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def setting(help: str, default: Any = MISSING, factory: Callable[[], Any] | None = None, **limits: Any) -> Any:
    """A field of the schema.

    Args:
        default: of a setting that is the same in every preset; the others have their values in `conf/*.yaml`.
        factory: makes the default of a list or a table.
        limits: see `About`.
    """
    metadata = {ABOUT: About(help, **limits)}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Mark(Enum):
    """PATH: a leading `~` is a home folder, and empty is refused. PROMPT: kept unchanged, `${...}` included."""

    PATH = "path"
    PROMPT = "prompt"


FilePath = Annotated[str, Mark.PATH]
Prompt = Annotated[str, Mark.PROMPT]
# {text: CAPTION} or {image: FILE}.
PromptTable = Annotated[dict[str, Any], Mark.PROMPT]
# Arguments of a part, some of which name files.
PartArguments = Annotated[dict[str, Any], Mark.PATH]

NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class SettingType:
    """The type of a setting, without its mark and without None.

    Attributes:
        optional: whether it may be null.
    """

    type: Any
    optional: bool = False
    mark: Mark | None = None
    about: About = About()

    @classmethod
    def of(cls, hint: Any, mark: Mark | None = None) -> SettingType:
        """From a type hint; `mark` is that of the table or list that holds the setting."""
        optional = hint is Any
        while True:
            if get_origin(hint) is Annotated:
                mark = next((each for each in hint.__metadata__ if isinstance(each, Mark)), mark)
                hint = hint.__origin__
            elif get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
                optional = True
                (hint,) = (each for each in get_args(hint) if each is not NoneType)
            else:
                return cls(
                    hint, optional, mark if get_origin(hint) is not list else cls.of(get_args(hint)[0], mark).mark
                )

    @property
    def fields(self) -> dict[str, SettingType] | None:
        """The settings of a dataclass by name; None for other types."""
        return _fields(self.type) if isinstance(self.type, type) and dataclasses.is_dataclass(self.type) else None

    def entry(self, name: str) -> SettingType | None:
        """The setting of that name or number inside this one; None if it cannot have one."""
        if self.type is Any:
            return dataclasses.replace(self, optional=True)
        if (fields := self.fields) is not None:
            return fields.get(name)
        arguments = get_args(self.type)
        number = self.is_list or self.numbered
        return None if not arguments or (number and not name.isdecimal()) else self.of(arguments[-1], self.mark)

    @property
    def is_text(self) -> bool:
        return self.type is str

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is list

    @property
    def is_text_list(self) -> bool:
        return self.is_list and self.of(get_args(self.type)[0]).is_text

    @property
    def numbered(self) -> bool:
        """Whether its entries are named by integers, such as a table of resolutions."""
        return get_origin(self.type) is dict and get_args(self.type)[0] is int

    @property
    def example(self) -> str:
        """What a value must be, for an error."""
        if self.fields is not None:
            return f"a table {{{', '.join(f'{name}: ...' for name in self.fields)}}}"
        if self.is_list:
            return f"a list [...], each entry {self.of(get_args(self.type)[0]).example}"
        if self.numbered:
            return f"a table {{1: ...}}, each entry {self.of(get_args(self.type)[1]).example}"
        name = NAMES.get(
            self.type, "a table {NAME: VALUE}" if get_origin(self.type) is dict else "a number, text, [...] or {...}"
        )
        return f"{name}, or null" if self.optional and self.type is not Any else name


@cache
def _fields(schema: type) -> dict[str, SettingType]:
    hints = get_type_hints(schema, include_extras=True)
    return {
        each.name: dataclasses.replace(SettingType.of(hints[each.name]), about=each.metadata.get(ABOUT, About()))
        for each in dataclasses.fields(schema)
    }


def look_up(schema: type, key: str) -> SettingType | None:
    """The type of the setting that a dotted key names; None if the schema has none of that name."""
    found: SettingType | None = SettingType(schema)
    for name in key.split("."):
        found = None if found is None else found.entry(name)
    return found


def keys(schema: type) -> list[str]:
    """The dotted keys of all settings and groups of settings that the schema names."""
    return list(_keys(SettingType(schema), ""))


def _keys(setting: SettingType, prefix: str) -> Iterator[str]:
    for name, inner in (setting.fields or {}).items():
        yield prefix + name
        yield from _keys(inner, f"{prefix}{name}.")


def shown(value: Any) -> str:
    """A value as a user writes it on a command line."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {shown(each)}' for name, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_SHOWN_INTEGER:
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def value_problems(config: Any, prefix: str = "") -> Iterator[str]:
    """A line on every value of a configuration that its setting does not take."""
    for name, setting in (SettingType(type(config)).fields or {}).items():
        yield from _value_problems(f"{prefix}{name}", getattr(config, name), setting.about)


def _value_problems(key: str, value: Any, about: About) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        yield from value_problems(value, f"{key}.")
    elif isinstance(value, Mapping | list):
        for name, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _value_problems(f"{key}.{name}", entry, about)
    elif problem := about.problem(value):
        came_from = about.environment if about.environment and os.environ.get(about.environment) == value else key
        yield f"{came_from}={shown(value)}: {problem}"


def check_values(config: Any, prefix: str = "") -> None:
    """Refuse a configuration with a value that its setting does not take.

    Args:
        prefix: of the keys, for a part of a configuration, such as "data.download.".

    Raises:
        ConfigError: with the setting, its value and the values that it takes.
    """
    for line in value_problems(config, prefix):
        raise ConfigError(line)
