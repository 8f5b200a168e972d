"""The run folder of a training command, for scripts: one line, as the trainer takes it, whatever is in the name.

    run_dir=$(python -m vdtrain.commands.run_folder stage=stage1_single_flow 'run_dir=my runs/first')

Needs no PyTorch, and looks at no files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from vdtrain.config.compose import ConfigError, run_command
from vdtrain.config.schema import TrainConfig

USAGE = """\
Usage: python -m vdtrain.commands.run_folder [GROUP=OPTION ...] [SETTING=VALUE ...]

Print the folder that `vdtrain train` would write to with these settings, as one line. Exit status 0; 2 after a mistake
in the settings, which is named on standard error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m vdtrain.commands.run_folder`."""

    def action(config: TrainConfig, document: DictConfig) -> int:
        if "\n" in config.run_dir or not config.run_dir:
            raise ConfigError(f"run_dir={config.run_dir!r}: no name on one line; give another folder")
        # As bytes: the name may be one that the terminal's encoding cannot show.
        sys.stdout.buffer.write(config.run_dir.encode("utf-8", "surrogateescape") + b"\n")
        sys.stdout.flush()
        return 0

    return run_command(USAGE, "train", TrainConfig, action, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
