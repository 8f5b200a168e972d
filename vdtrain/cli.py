"""`vdtrain COMMAND ...`: finds the command's module and hands it the rest of the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import vdtrain

# Verb -> its module, and what it does.
COMMANDS = {
    "train": ("vdtrain.commands.train", "train one stage of the curriculum"),
    "plan": ("vdtrain.commands.plan", "say what training one will take of memory, disk and steps"),
    "preflight": ("vdtrain.commands.preflight", "look, before the GPUs are used, whether a stage can be trained"),
    "status": ("vdtrain.commands.status", "say how a run stands, from its files"),
    "sample": ("vdtrain.commands.sample", "make images and captions with a trained model"),
    "blend": ("vdtrain.commands.blend", "make them from several captions and images at once"),
    "edit": ("vdtrain.commands.edit", "change images by words"),
    "evaluate": ("vdtrain.commands.evaluate", "measure a trained model: FID and CLIP scores"),
    "weights": ("vdtrain.commands.weights", "bring published weights in, and trained ones out"),
}

USAGE = """\
Usage: vdtrain COMMAND [GROUP=OPTION ...] [SETTING=VALUE ...]

Trains Versatile Diffusion: one diffusion model for text and images, in stages, flow by flow.

Commands:
{commands}

`vdtrain COMMAND --help` explains a command; `vdtrain COMMAND --cfg job` prints its configuration.
`vdtrain --version` prints the version.
The data that a training run streams is made by `python -m data_pipeline --help`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
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
            f"error: {command!r} is no command; choose one of {', '.join(COMMANDS)} (see vdtrain --help)",
            file=sys.stderr,
        )
        return 2
    status = importlib.import_module(COMMANDS[command][0]).main(rest)
    assert isinstance(status, int)
    return status


if __name__ == "__main__":
    sys.exit(main())
