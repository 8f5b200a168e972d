"""`vdtrain COMMAND ...`: imports the module of the command and passes it the rest of the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import vdtrain
from vdtrain.config.suggestions import meant
from vdtrain.run import signals

# Each command with its module and what it does.
COMMANDS = {
    "train": ("vdtrain.commands.train", "train one stage of the curriculum"),
    "plan": ("vdtrain.commands.plan", "estimate memory, disk space, steps and time"),
    "bench": ("vdtrain.commands.bench", "measure the training step on this machine, without data"),
    "preflight": ("vdtrain.commands.preflight", "check the configuration and environment before training"),
    "status": ("vdtrain.commands.status", "show the progress of a run"),
    "report": ("vdtrain.commands.report", "make a page of a run: curves, samples, starts, evaluations"),
    "sample": ("vdtrain.commands.sample", "make images and captions with a trained model"),
    "blend": ("vdtrain.commands.blend", "make them from several captions and images at once"),
    "edit": ("vdtrain.commands.edit", "edit images by words"),
    "app": ("vdtrain.commands.app", "do all of that in a page in the browser"),
    "evaluate": ("vdtrain.commands.evaluate", "measure a trained model, or images and captions of another"),
    "compare": ("vdtrain.commands.compare", "let people choose blindly between two sets of samples"),
    "weights": ("vdtrain.commands.weights", "import published weights, and export trained ones"),
    "data": ("data_pipeline.__main__", "prepare data: select, download, pack, index, latents, inspect"),
}

USAGE = """\
Usage: vdtrain COMMAND [GROUP=OPTION ...] [SETTING=VALUE ...]

Train Versatile Diffusion: one diffusion model for text and images, in stages, flow by flow.

Commands:
{commands}

`vdtrain COMMAND --help` explains a command and its settings; `vdtrain COMMAND --cfg job` prints its configuration.
`vdtrain --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status. Without `argv`, signals end it in order."""
    if argv is None:
        signals.begin()
        return signals.ended(signals.quietly(lambda: main(sys.argv[1:])))
    arguments = list(argv)
    usage = USAGE.format(commands="\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()))
    if not arguments or arguments[0] in ("--help", "-h"):
        print(usage, end="")
        return 0 if arguments else 2
    if arguments == ["--version"]:
        print(f"vdtrain {vdtrain.__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(
            f"error: unknown command {command!r}; choose from {', '.join(COMMANDS)} (see vdtrain --help)"
            f"{meant(command, COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    status = importlib.import_module(COMMANDS[command][0]).main(rest)
    assert isinstance(status, int)
    return status


if __name__ == "__main__":
    sys.exit(main())
