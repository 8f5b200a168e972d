"""What a setting is: its type in the dataclasses of the schema, and two marks that a type alone does not tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


class Mark(Enum):
    """PATH: a leading `~` is a home folder, and empty is refused. PROMPT: kept to the letter, `${...}` included."""

    PATH = "path"
    PROMPT = "prompt"


FilePath = Annotated[str, Mark.PATH]
Prompt = Annotated[str, Mark.PROMPT]
# {text: CAPTION} or {image: FILE}.
PromptTable = Annotated[dict[str, Any], Mark.PROMPT]
# Arguments of a part, some of which name files.
PartArguments = Annotated[dict[str, Any], Mark.PATH]

NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class SettingType:
    """The type of a setting, without its mark and without None.

    Attributes:
        optional: whether it may be null.
    """

    type: Any
    optional: bool = False
    mark: Mark | None = None

    @classmethod
    def of(cls, hint: Any, mark: Mark | None = None) -> SettingType:
        """From a type hint; `mark` is that of the table or list which holds the setting."""
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
        """Of a dataclass, the settings in it by name; None for other types."""
        return _fields(self.type) if isinstance(self.type, type) and dataclasses.is_dataclass(self.type) else None

    def entry(self, name: str) -> SettingType | None:
        """The setting of that name or number inside this one; None if there can be none."""
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
        """Whether its entries are named by integers, as those of a table of resolutions."""
        return get_origin(self.type) is dict and get_args(self.type)[0] is int

    @property
    def example(self) -> str:
        """What a value must be, for an error."""
        if self.fields is not None:
            return f"a table {{{', '.join(f'{name}: ...' for name in self.fields)}}}"
        if self.is_list:
            return f"a list [...], of which each is {self.of(get_args(self.type)[0]).example}"
        if self.numbered:
            return f"a table {{1: ...}}, of which each is {self.of(get_args(self.type)[1]).example}"
        name = NAMES.get(
            self.type, "a table {NAME: VALUE}" if get_origin(self.type) is dict else "a number, text, [...] or {...}"
        )
        return f"{name}, or null" if self.optional and self.type is not Any else name


@cache
def _fields(schema: type) -> dict[str, SettingType]:
    hints = get_type_hints(schema, include_extras=True)
    return {field.name: SettingType.of(hints[field.name]) for field in dataclasses.fields(schema)}


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
