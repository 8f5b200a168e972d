"""The text of `--help`: what a command does, its groups, and every setting of it as the schema has it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from vdtrain.config.compose import SCHEMAS, command_groups, compose, groups, options
from vdtrain.config.data_schema import PREPARATION
from vdtrain.config.fields import SettingType, shown
from vdtrain.config.overrides import Override
from vdtrain.errors import ConfigError

WIDTH, COLUMN, LONGEST_DEFAULT = 120, 44, 70
OPTIONS = """
Options:
  --help              this text
  --cfg job           print the configuration and exit (--resolve fills in its ${...})
"""


def help_text(usage: str, config_name: str, choices: Sequence[Override], parts: Sequence[str] = ()) -> str:
    """The usage, the groups and the settings of a command.

    Args:
        choices: options of groups; the defaults shown are those of these options.
        parts: keys of the settings and tables to show; none for all that is not the preparation of data.
    """
    try:
        defaults = compose(config_name, choices)
    except ConfigError:
        defaults = compose(config_name, [])
    values = OmegaConf.to_container(defaults)
    lines = [
        line
        for key, default, setting in _settings(SettingType(SCHEMAS[config_name]), values, "")
        if _within(key, parts) or (not parts and not _within(key, PREPARATION))
        for line in _lines(key, default, setting)
    ]
    return "\n".join([usage + OPTIONS + _groups(config_name), "Settings, with their defaults:", *lines])


def _within(key: str, parts: Sequence[str]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def _settings(table: SettingType, values: Any, prefix: str) -> Iterator[tuple[str, Any, SettingType]]:
    """Every setting with a help text: its key, its default ("" if it has none) and its type."""
    for name in _own_first(table.type):
        setting, key = (table.fields or {})[name], prefix + name
        value = values.get(name, "") if isinstance(values, Mapping) else ""
        entry = setting.entry("0" if setting.is_list or setting.numbered else "NAME")
        if setting.about.help:
            yield key, value, setting
        elif setting.fields is not None:
            yield from _settings(setting, value, f"{key}.")
        elif entry is not None:
            yield from _settings(entry, None, f"{key}.{'N' if setting.is_list else 'NAME'}.")


def _own_first(schema: type) -> list[str]:
    """Names of the settings of a dataclass, its own before inherited ones."""
    return list(dict.fromkeys(name for each in schema.__mro__ for name in inspect.get_annotations(each)))


def _lines(key: str, default: Any, setting: SettingType) -> list[str]:
    text = shown(default)
    text = text if len(text) <= LONGEST_DEFAULT else f"{text[: LONGEST_DEFAULT - 3]}..."
    head = f"  {key}={text}" if text else f"  {key}"
    about = setting.about
    limits = ", ".join(map(str, about.choices)) or about.bounds
    body = textwrap.wrap(f"{about.help} [{limits}]" if limits else about.help, WIDTH - COLUMN)
    first = [f"{head:<{COLUMN}}{body[0]}"] if len(head) < COLUMN - 1 else [head, " " * COLUMN + body[0]]
    return [*first, *(" " * COLUMN + line for line in body[1:])]


def _groups(config_name: str) -> str:
    chosen = {group: default for group, default in command_groups(config_name) if not default.startswith("$")}
    lines = [
        f"  {group.replace('/', '.') + '=':<16} {', '.join(options(group))}"
        + (f" (default: {chosen[group]})" if group in chosen else "")
        for group in groups()
        if group.partition("/")[0] in chosen
    ]
    return "\n".join(["\nGroups:", *lines, ""]) if lines else ""
