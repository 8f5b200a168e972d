"""What every command does first: it reads its command line, composes its configuration and checks the values.

Here are also the text of `--help`, and the line that a command prints when memory is out.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from vdtrain.config.command_line import CommandLine, split
from vdtrain.config.command_schema import AUTO, LatentsConfig, SamplerConfig
from vdtrain.config.compose import SCHEMAS, command_groups, compose, groups, options, parsed, to_object
from vdtrain.config.data_schema import PREPARATION
from vdtrain.config.fields import SettingType, check_values, shown
from vdtrain.config.overrides import Override
from vdtrain.config.schema import TrainConfig
from vdtrain.config.settings import REMOVED, unknown
from vdtrain.errors import ConfigError, described, one_line, out_of_memory, printable
from vdtrain.redaction import learn, redacted_output
from vdtrain.run.signals import ending

WIDTH, COLUMN, LONGEST_DEFAULT = 120, 44, 70
OPTIONS = """
Options:
  --help              this text
  --cfg job           print the configuration and exit (--resolve fills in its ${...})
"""


def help_text(usage: str, config_name: str, choices: Sequence[Override], parts: Sequence[str]) -> str:
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


def memory_problem(error: BaseException, config: Any) -> str | None:
    """One line for an error of memory, with the settings that help; None for another error.

    Args:
        config: of the command.
    """
    if not out_of_memory(error):
        return None
    said = one_line(error).partition(". ")[0][:200]
    if isinstance(config, TrainConfig):
        remedies = _of_training(config)
    elif isinstance(config, LatentsConfig):
        remedies = [f"data.latent_cache.batch_size={max(1, config.data.latent_cache.batch_size // 2)}"]
    elif isinstance(config, SamplerConfig):
        remedies = _of_sampling(config)
    else:
        remedies = ["a machine with more memory"]
    return f"out of memory ({said}); try {', or '.join(remedies)}"


def _of_training(config: TrainConfig) -> list[str]:
    hardware = config.hardware
    sizes = {each.resolution: hardware.micro_batch_size.get(each.resolution, 1) for each in config.stage.phases}
    smaller = [f"hardware.micro_batch_size.{pixels}={size // 2}" for pixels, size in sizes.items() if size > 1]
    found = [f"{' '.join(smaller)} (the steps stay the same)"] if smaller else []
    if hardware.activation_checkpointing != "blocks":
        found.append("hardware.activation_checkpointing=blocks")
    if hardware.zero_stage < 2:
        found.append(f"hardware.zero_stage={hardware.zero_stage + 1} on several GPUs")
    return found or ["fewer flows, or a GPU with more memory"]


def _of_sampling(config: SamplerConfig) -> list[str]:
    import torch

    found = [f"batch_size={config.batch_size // 2}"] if config.batch_size > 1 else []
    on_cpu = config.device == "cpu" or (config.device == AUTO and not torch.cuda.is_available())
    if config.precision == "fp32" or (config.precision == AUTO and on_cpu):
        found.append("precision=bf16" if on_cpu else "precision=fp16")
    return [*found, "a smaller resolution"]


Schema = TypeVar("Schema")


@redacted_output()
def run_command(
    usage: str,
    config_name: str,
    schema: type[Schema],
    action: Callable[[Schema, DictConfig], int],
    argv: Sequence[str],
    is_main: bool = True,
    plain: Callable[[CommandLine], list[Override]] | None = None,
    parts: Sequence[str] = (),
    checked: bool = True,
) -> int:
    """Parse a command line, compose the configuration, call `action`, and return the exit status.

    `--help` prints `usage`, groups and settings. `--cfg job` prints the configuration (`--resolve` with its
    interpolations filled in) and stops. A ConfigError becomes one line on stderr and its status.

    Args:
        action: gets the configuration as its dataclass, and unresolved.
        is_main: False if another process prints the same error.
        plain: the settings that plain arguments stand for; None if the command has no such arguments.
        parts: of the settings, for `--help`; see `help_text`.
        checked: False if `action` reports values outside their choices and bounds itself.
    """
    made: Schema | None = None
    try:
        line = split(argv, schema, groups(), plain is not None)
        if line.help:
            print(help_text(usage, config_name, line.overrides, parts))
            return 0
        words = [*line.overrides, *(plain(line) if plain is not None else map(parsed, line.plain))]
        config = compose(config_name, [word for word in words if not _removed(word, schema, is_main)])
        learn(OmegaConf.to_container(config))
        if line.print:
            print(OmegaConf.to_yaml(config, resolve=line.resolve), end="")
            return 0
        made = to_object(config, schema)
        if checked:
            check_values(made)
        return action(made, config)
    except ConfigError as error:
        ending.check()
        if is_main:
            print(f"error: {printable(str(error))}", file=sys.stderr)
        ending.told = error.status
        return error.status
    except (RuntimeError, MemoryError) as error:
        if (problem := memory_problem(error, made)) is None:
            raise
        # Other processes may have enough.
        print(f"error: {printable(problem)}", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        ending.check()
        # An error that no part of the command has described.
        print(f"error: {printable(described(error))}", file=sys.stderr)
        return 1


def _removed(word: Override, schema: type, is_main: bool) -> bool:
    """Whether a word sets a removed setting to its only legal value, which changes nothing."""
    if word.key not in REMOVED or word.sign or word.text != REMOVED[word.key]:
        return False
    if is_main:
        print(f"warning: {unknown(word.key, schema)}", file=sys.stderr)
    return True
