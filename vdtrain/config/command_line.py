"""The words of a command line: flags, overrides, and plain arguments such as a checkpoint and its prompts."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from vdtrain.config.fields import look_up
from vdtrain.config.overrides import Override
from vdtrain.config.settings import nearest, unknown
from vdtrain.config.suggestions import FOREIGN
from vdtrain.errors import ConfigError, printable

FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)
HELP, PRINT, RESOLVE = ("--help", "-h"), ("--cfg", "-c", "--cfg=job", "-c=job"), "--resolve"
# What stands in the place of Hydra's own flags.
ONE_RUN = "a command makes one run; type it once for each value"
OWN_OPTIONS = "add a folder of options with hydra.searchpath=[FOLDER], and choose them with GROUP=OPTION"
HYDRAS = {
    **dict.fromkeys(("--multirun", "-m"), ONE_RUN),
    **dict.fromkeys(("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd"), OWN_OPTIONS),
}
# What a setting's key looks like; a prompt such as "E=mc2" or a path such as runs/lr=1e-4 does not.
SETTING_KEY = re.compile(r"[a-z_][a-z0-9_.]*")
# Every word after it is a plain argument.
END_OF_OPTIONS = "--"
SETTING_FORM = "write settings as SETTING=VALUE, such as seed=1"


@dataclass(frozen=True)
class CommandLine:
    """The words of a command line, sorted. With `help`, the overrides are the options of groups alone."""

    help: bool = False
    print: bool = False
    resolve: bool = False
    overrides: list[Override] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PlainArguments:
    """The settings that a command's plain arguments stand for, in order.

    Attributes:
        settings: each takes one word, unless it is given as SETTING=VALUE.
        rest: a list that takes all further words; None if no further words are allowed.
        item: makes an item of that list from a word.
    """

    settings: tuple[str, ...] = ()
    rest: str | None = None
    item: Callable[[str], Any] = str

    def __call__(self, line: CommandLine) -> list[Override]:
        """The plain arguments of a command line as overrides.

        Raises:
            ConfigError: there are too many, or a list is given in both ways.
        """
        given = {override.key for override in line.overrides}
        open_settings = [setting for setting in self.settings if setting not in given]
        words = line.plain[: len(open_settings)]
        made = [
            Override(f"{setting}={word}", "", setting, word, verbatim=True)
            for setting, word in zip(open_settings, words, strict=False)
        ]
        rest = line.plain[len(words) :]
        if rest and self.rest is None:
            raise ConfigError(f"{printable(' '.join(map(repr, rest)))}: too many plain arguments; {self.form}")
        if rest and self.rest in given:
            raise ConfigError(f"{self.rest}: given as plain arguments and as {self.rest}=; use one of the two")
        if rest and self.rest is not None:
            made.append(Override(" ".join(rest), "", self.rest, None, given=[self.item(word) for word in rest]))
        return made

    @property
    def form(self) -> str:
        """How to write the plain arguments."""
        words = [setting.upper().rpartition(".")[2] for setting in self.settings]
        words += [f"{self.rest.upper().removesuffix('S')} ..."] if self.rest is not None else []
        return f"write {' '.join(words)}, then SETTING=VALUE" if words else "write SETTING=VALUE"


def split(argv: Sequence[str], schema: type, groups: Collection[str], takes_plain: bool) -> CommandLine:
    """Sort the words of a command line.

    Args:
        groups: names of the groups of settings that have options.
        takes_plain: whether the command has plain arguments.

    Raises:
        ConfigError: an unknown flag or setting, or a word that is not UTF-8.
    """
    if not takes_plain:
        argv = [word for word in argv if word != END_OF_OPTIONS]
    end = argv.index(END_OF_OPTIONS) if END_OF_OPTIONS in argv else len(argv)
    words, plain = argv[:end], argv[end + 1 :]
    if set(words) & set(HELP):
        choices = [made for word in words if (made := Override.parse(word)) and made.key.replace(".", "/") in groups]
        return CommandLine(help=True, overrides=choices)
    for word in argv:
        if any(0xD800 <= ord(character) < 0xE000 for character in word):
            raise ConfigError(f"{printable(word)}: not UTF-8; set a UTF-8 locale, or rename the file")
    flags, overrides, early = set(), [], []
    for index, word in enumerate(words):
        if FLAG.fullmatch(word):
            flags.add(_flag(word, schema, takes_plain))
        elif words[max(0, index - 1)] in PRINT[:2] and word in ("job", "all", "hydra"):
            if word != "job":
                raise ConfigError(f"--cfg {word}: write --cfg job")
        elif (override := _override(word, schema, groups, takes_plain)) is not None:
            overrides.append(override)
        else:
            early.append(word)
    if RESOLVE in flags and not flags & set(PRINT):
        raise ConfigError(f"{RESOLVE}: goes with --cfg job")
    return CommandLine(False, bool(flags & set(PRINT)), RESOLVE in flags, overrides, [*early, *plain])


def _flag(word: str, schema: type, takes_plain: bool) -> str:
    if word in (*PRINT, RESOLVE):
        return word
    flag, equal, value = printable(word).partition("=")
    if flag in PRINT:
        raise ConfigError(f"{printable(word)}: write --cfg job")
    if flag in HYDRAS:
        raise ConfigError(f"unknown flag {printable(word)}: {HYDRAS[flag]}")
    name = flag.lstrip("-").replace("-", "_")
    own = [name] if look_up(schema, name) is not None else nearest(name, schema)[: int(len(name) > 1)]
    # The value of another program's word may have another meaning.
    kept = equal and name not in FOREIGN
    meant = f"write {own[0]}={value if kept else 'VALUE'}" if own else SETTING_FORM
    plain = "; put a plain argument that begins with - last, after --" if takes_plain else ""
    raise ConfigError(f"unknown flag {printable(word)}: {meant}{plain}")


def _override(word: str, schema: type, groups: Collection[str], takes_plain: bool) -> Override | None:
    """The word as an override; None if it is a plain argument, even if the command takes none."""
    override = Override.parse(word)
    if override is None:
        return None
    first = override.key.partition(".")[0]
    known = first in groups or override.key in groups or look_up(schema, first) is not None or first == "hydra"
    if known or not takes_plain:
        return override
    if override.text is None or not SETTING_KEY.fullmatch(override.key) or os.path.exists(word):
        return None
    raise ConfigError(
        f"{unknown(override.key, schema)}; put a plain argument with = in it last, after --, and write a file as ./FILE"
    )


def plain_path(path: str) -> str:
    """A path in a form that is not taken for a setting or a flag."""
    return path if os.path.isabs(path) or re.fullmatch(r"[\w.][\w./-]*", path) else f"./{path}"


def shell(words: Sequence[str]) -> str:
    """Words as one line that bash splits into exactly these words."""
    return " ".join(shlex.quote(word) if word.isprintable() else f"$'{''.join(map(_ansi, word))}'" for word in words)


def _ansi(character: str) -> str:
    if character in ("\\", "'"):
        return "\\" + character
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
