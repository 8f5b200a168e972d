"""Print the run folder of a training command on one line, for scripts.

    run_dir=$(python -m vdtrain.commands.run_folder stage=stage1_single_flow 'run_dir=my runs/first')

Imports no PyTorch, and reads only the configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.schema import TrainConfig
from vdtrain.errors import ConfigError
from vdtrain.run.signals import quietly

USAGE = """\
Usage: python -m vdtrain.commands.run_folder [GROUP=OPTION ...] [SETTING=VALUE ...]

Print the folder that `vdtrain train` would write to with these settings, on one line. Exit status 0, or 2 for a mistake
in the settings, which is printed on standard error.
"""


def main(arguments: Sequence[str]) -> int:
    """Print the folder; returns the exit status."""

    def action(config: TrainConfig, raw_config: DictConfig) -> int:
        if "\n" in config.run_dir or not config.run_dir:
            raise ConfigError(f"run_dir={config.run_dir!r}: empty, or not one line; give another folder")
        # As bytes, as the encoding of the terminal may lack characters of the name.
        sys.stdout.buffer.write(config.run_dir.encode("utf-8", "surrogateescape") + b"\n")
        sys.stdout.flush()
        return 0

    return run_command(USAGE, "train", TrainConfig, action, arguments, parts=("run_dir", "runs_dir"))


if __name__ == "__main__":
    sys.exit(quietly(lambda: main(sys.argv[1:])))
