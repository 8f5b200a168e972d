"""The error of a user's mistake, and how it is shown."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the setting, its value and the remedy."""


def printable(text: str) -> str:
    r"""The text on one line: a line break in a value is shown as \n, and so on for all that a terminal would act on."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in text
    )
