"""Overrides applied to a composed configuration one after another, and its paths completed; errors name the word."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, OmegaConf, errors, open_dict

from vdtrain.config.data_schema import PREPARATION
from vdtrain.config.fields import Mark, SettingType, keys, look_up
from vdtrain.config.overrides import Override, SettingValueError
from vdtrain.config.suggestions import meant, nearest_keys
from vdtrain.errors import ConfigError

ADDS = "write + before it to add an entry"
# Of a file name and of a whole path, in bytes.
LONGEST_NAME, LONGEST_PATH = 255, 4095
INTERPOLATION = "`${` begins the name of another setting; write `\\${` for the characters themselves"

# Names of the first release.
RENAMED = {
    "data.shapes.pictures": "data.shapes.images",
    "data.inspect.pictures": "data.inspect.images",
    "data.select.filters.duplicate_pictures": "data.select.filters.duplicate_images",
}
# Settings of the first release that had one legal value each, and that value. It is still accepted and changes nothing.
REMOVED = {"hardware.offload_optimizer": "false"}


def apply(config: DictConfig, override: Override, schema: type) -> None:
    """Change `config` by an override.

    Raises:
        ConfigError: the setting does not exist, or it cannot take the value.
    """
    setting = look_up(schema, override.key)
    if setting is None or override.key.startswith("."):
        raise unknown(override.key, schema)
    parent, _, name = override.key.rpartition(".")
    holder = look_up(schema, parent) if parent else SettingType(schema)
    assert holder is not None
    key: int | str = int(name) if holder.numbered or holder.is_list else name
    table = OmegaConf.select(config, parent, throw_on_missing=False) if parent else config
    above, _, last = parent.rpartition(".")
    outer = OmegaConf.select(config, above, throw_on_missing=False) if above else config
    if table is None and holder.fields is not None and isinstance(outer, DictConfig) and last in outer:
        raise ConfigError(
            f"{override.shown}: {parent} is null; set the whole table, {parent}={{{', '.join(holder.fields)}}}"
        )
    if not isinstance(table, Container) and not override.sign.startswith("+"):
        raise _not_there(config, override)
    try:
        there = isinstance(table, Container) and _has(table, key)
        if override.sign == "~":
            _remove(config, override, table, key, there, holder)
            return
        present = (
            OmegaConf.select(config, override.key, throw_on_missing=False) if there and not holder.numbered else None
        )
        if override.sign == "+" and there and present is not None and not isinstance(present, Container):
            raise ConfigError(f"{override.shown}: {override.key} exists already; leave out the +")
        value = override.value(setting, present)
        if not there and not override.sign:
            raise _not_there(config, override)
        if holder.numbered:
            OmegaConf.update(config, parent, {key: value}, merge=True, force_add=True)
        else:
            # A whole table for an empty one needs no sign: it replaces nothing.
            adds = bool(override.sign) or (isinstance(present, DictConfig) and not present)
            OmegaConf.update(config, override.key, value, merge=True, force_add=adds)
    except SettingValueError as error:
        raise ConfigError(f"{override.shown}: {error}") from error
    except errors.OmegaConfBaseException as error:
        absent = isinstance(error, errors.ConfigKeyError | errors.ConfigAttributeError)
        kind = getattr(error, "object_type", None)
        if absent and isinstance(kind, type) and (fields := SettingType(kind).fields) is not None:
            raise ConfigError(
                f"{override.shown}: no such setting {error.key!r}, only {', '.join(fields)}{meant(error.key, fields)}"
            ) from error
        if absent and setting.fields is None and not override.sign:
            raise ConfigError(f"{override.shown}: no such entry, {_names(present)}; {ADDS}") from error
        where, what = explained(error, schema, override.key)
        inner = f"{where.rpartition('.')[2]} " if where != override.key and where.startswith(override.key) else ""
        raise ConfigError(f"{override.shown}: {inner}{what}") from error


def _not_there(config: DictConfig, override: Override) -> ConfigError:
    table: Any = config
    place: list[str] = []
    for name in override.key.split("."):
        key: Any = int(name) if name.isdecimal() else name
        if not isinstance(table, DictConfig | ListConfig) or not _has(table, key):
            break
        table = table[key]
        place.append(name)
    remedy = f"set the whole list, {'.'.join(place)}=[...]" if isinstance(table, ListConfig) else ADDS
    return ConfigError(f"{override.shown}: {'.'.join(place)} has no {name!r}, {_names(table)}; {remedy}")


def _has(table: Any, key: int | str) -> bool:
    return 0 <= int(key) < len(table) if isinstance(table, ListConfig) else key in table.keys()  # noqa: SIM118


def _remove(
    config: DictConfig, override: Override, table: Any, key: int | str, there: bool, holder: SettingType
) -> None:
    if holder.fields is not None:
        raise ConfigError(f"{override.shown}: this setting cannot be removed; give it a value")
    if not there:
        raise ConfigError(f"{override.shown}: no such entry to remove, {_names(table)}")
    if override.text is not None and str(table[key]) != override.text:
        raise ConfigError(f"{override.shown}: its value is {table[key]}; leave out the value to remove it")
    with open_dict(config):
        del table[key]


def _names(table: Any) -> str:
    if not isinstance(table, DictConfig | ListConfig):
        return "it cannot have entries"
    names = [str(name) for name in (table if isinstance(table, DictConfig) else range(len(table)))]
    return f"only {', '.join(names)}" if names else "the table is empty"


def unknown(key: str, schema: type) -> ConfigError:
    """The error for a key that the schema does not have, with the nearest that it has."""
    if key in RENAMED:
        return ConfigError(f"{key}: renamed; write {RENAMED[key]}")
    if key in REMOVED:
        return ConfigError(f"{key}: removed, as {REMOVED[key]} was its only legal value; leave it out")
    likely = nearest(key, schema)
    hint = f"did you mean {' or '.join(map(repr, likely))}?" if likely else "--cfg job prints all settings"
    return ConfigError(f"{key}: no such setting; {hint}")


def nearest(key: str, schema: type) -> list[str]:
    """The keys of the schema most like `key`, and of its tables without fields, such as `data.stream`."""
    return nearest_keys(key, _every_key(schema), PREPARATION)


@cache
def _every_key(schema: type) -> list[str]:
    from vdtrain.config.compose import SCHEMAS, compose

    name = next((name for name, each in SCHEMAS.items() if each is schema), None)
    # A broken folder of the user's own must not hide the error that is being described.
    with suppress(ConfigError):
        defaults = OmegaConf.to_container(compose(name, [])) if name is not None else {}
        return list(dict.fromkeys([*keys(schema), *_names_inside(defaults, "")]))
    return keys(schema)


def _names_inside(table: Any, prefix: str) -> Iterator[str]:
    for name, value in table.items() if isinstance(table, dict) else ():
        if str(name).isidentifier() and not str(name).startswith("_"):
            yield f"{prefix}{name}"
            yield from _names_inside(value, f"{prefix}{name}.")


def complete(config: DictConfig, schema: type) -> None:
    """Expand `~` in the paths, and check that every setting has a value and that every reference resolves.

    Raises:
        ConfigError: with the setting, its value and the remedy.
    """
    for place, path, setting in list(_walk(OmegaConf.to_container(config), SettingType(schema))):
        if setting.mark is Mark.PATH and isinstance(path, str) and path.startswith("~"):
            table: Any = config
            for name in place[:-1]:
                table = table[name]
            table[place[-1]] = _at_home(path, _key(place))
    try:
        container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except RecursionError as error:
        raise ConfigError("a setting refers to itself; --cfg job prints the settings with their ${...}") from error
    except errors.OmegaConfBaseException as error:
        key, what = explained(error, schema)
        raw = _raw(OmegaConf.to_container(config), key)
        raise ConfigError(f"{key}{f'={raw}' if isinstance(raw, str) else ''}: {what}") from error
    for place, value, setting in _walk(container, SettingType(schema)):
        # A reference may lead to something else than a list.
        if setting.is_list and value is not None and not isinstance(value, list):
            raise ConfigError(f"{_key(place)}={value}: must be {setting.example}")
        if setting.mark is Mark.PATH and setting.is_text and value is not None:
            _check_path(_key(place), value)


def _raw(value: Any, key: str) -> Any:
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _walk(value: Any, setting: SettingType, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any, SettingType]]:
    """A value and all values inside it, each with its place and its setting."""
    yield place, value, setting
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in entries:
        if (inner := setting.entry(str(name))) is not None:
            yield from _walk(each, inner, (*place, name))


def _key(place: tuple[Any, ...]) -> str:
    return ".".join(map(str, place))


def _at_home(path: str, place: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise ConfigError(f"{place}={path}: no such user {user[1:]!r}; write ./{user} for a folder of that name")
    return expanded


def _check_path(key: str, path: str) -> None:
    """Refuse an empty path, and one that is too long."""
    if not path.strip():
        raise ConfigError(f"{key}={path}: empty; give a file or folder (. is this one)")
    if len(os.fsencode(path)) > LONGEST_PATH or any(len(os.fsencode(name)) > LONGEST_NAME for name in path.split("/")):
        raise ConfigError(f"{key}={path[:40]}...: too long for the name of a file or folder; give a shorter one")


def explained(error: BaseException, schema: type, near: str = "") -> tuple[str, str]:
    """The setting that an error of OmegaConf is about, and our description of the error.

    Args:
        near: the key that was changed; the setting is inside it.
    """
    named = str(getattr(error, "full_key", None) or near).replace("[", ".").replace("]", "")
    # OmegaConf builds a value before it inserts it, and then names the setting relative to the value.
    key = next((each for each in (named, f"{near}.{named}", f"{near}.0.{named}") if look_up(schema, each)), named)
    setting = look_up(schema, key) or look_up(schema, near)
    if isinstance(error, errors.InterpolationKeyError | errors.UnsupportedInterpolationType):
        return key, f"its ${{...}} names no setting; {INTERPOLATION}"
    if isinstance(error, errors.GrammarParseError):
        return key, f"not a valid reference; {INTERPOLATION}"
    if isinstance(error, errors.MissingMandatoryValue):
        return key, f"has no value; give {key}=VALUE"
    if isinstance(error, errors.KeyValidationError):
        return near or key, "must be a table whose names are integers, without quotes"
    if isinstance(error, errors.ConfigKeyError | errors.ConfigAttributeError | errors.ConfigIndexError):
        return key, str(unknown(key, schema)).removeprefix(f"{key}: ")
    if isinstance(error, errors.InterpolationResolutionError):
        return key, f"its ${{...}} cannot be resolved; {INTERPOLATION}"
    if isinstance(error, errors.ValidationError) and setting is not None:
        return key, f"must be {setting.example}"
    return key, f"must be {setting.example}" if setting is not None else "cannot be used; --cfg job prints all settings"
