"""`python -m miniature COMMAND`: the demo's drawn images."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from miniature.image_set import serve, write_image_set
from vdtrain.config.command import run_command
from vdtrain.config.command_line import HELP
from vdtrain.config.command_schema import DataPipelineConfig
from vdtrain.config.data_schema import ShapesConfig
from vdtrain.errors import ConfigError
from vdtrain.files import check_output
from vdtrain.run.signals import quietly

USAGE = """\
Usage: python -m miniature COMMAND data=shapes [SETTING=VALUE ...]

Commands:
{commands}

`python -m miniature COMMAND --help` lists the settings of a command.
`python -m miniature.frozen` trains the frozen parts of the tiny preset.
"""

COMMAND_USAGE = """\
Usage: python -m miniature {command} data=shapes [SETTING=VALUE ...]

{text}.
"""


def _draw(shapes: ShapesConfig) -> None:
    check_output(Path(shapes.folder), f"data.shapes.folder={shapes.folder}")
    write_image_set(shapes)


def _serve(shapes: ShapesConfig) -> None:
    # `kill` stops it as Ctrl-C does: that is its normal end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            serve(shapes)
    except OSError as error:
        raise ConfigError(
            f"data.shapes.port={shapes.port}: {error.strerror or error}; give another port, or end what listens there"
        ) from error


COMMANDS: dict[str, tuple[Callable[[ShapesConfig], None], str]] = {
    "draw": (_draw, "draw the demo's images and write their metadata"),
    "serve": (_serve, "serve these images on this machine, for the download (stop with Ctrl-C)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("--help", "-h"):
        print(USAGE.format(commands="\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())), end="")
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    run, text = COMMANDS[command]

    def action(config: DataPipelineConfig, raw_config: DictConfig) -> int:
        if config.data.shapes is None:
            raise ConfigError(f"data={config.data.name}: has no drawn images; use data=shapes")
        run(config.data.shapes)
        return 0

    usage, parts = COMMAND_USAGE.format(command=command, text=text[0].upper() + text[1:]), ("data.root", "data.shapes")
    try:
        # The defaults in the help are those of data=shapes.
        rest = ["data=shapes", *rest] if set(HELP) & set(rest) else rest
        return run_command(usage, "data_pipeline", DataPipelineConfig, action, rest, parts=parts)
    except KeyboardInterrupt:
        print("stopped; run it again to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(quietly(main))
