"""What every command does first: it reads its command line, composes its configuration and checks the values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf

from vdtrain.config.command_line import CommandLine, split
from vdtrain.config.compose import compose, groups, parsed, to_object
from vdtrain.config.fields import check_values
from vdtrain.config.help import help_text
from vdtrain.config.memory import memory_problem
from vdtrain.config.overrides import Override
from vdtrain.config.settings import REMOVED, unknown
from vdtrain.errors import ConfigError, described, printable
from vdtrain.redaction import learn, redacted_output
from vdtrain.run.signals import ending

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
