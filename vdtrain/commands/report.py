"""Make one HTML page of a run, or of a whole curriculum."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.command_line import PlainArguments
from vdtrain.config.command_schema import ReportConfig
from vdtrain.errors import ConfigError

USAGE = """\
Usage: vdtrain report [RUN_DIR ...] [SETTING=VALUE ...]

Make one HTML page of a run and of the stages before it: losses and all other figures over the samples, images over
time, starts and restarts, what changed between them, evaluations, configuration and environment. The page is one file
that loads nothing from elsewhere. RUN_DIR is the run of the last stage; its configuration tells where the stages before
it are. It can also be the folder of a curriculum's runs, or all its runs in their order.

Examples:
  vdtrain report runs/stage3_four_flow
  vdtrain report runs/stage2_dual_flow output=report.html image_megabytes=4
"""


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain report`; returns its exit status."""

    def action(config: ReportConfig, raw_config: DictConfig) -> int:
        if not config.run_dirs:
            raise ConfigError("run_dirs: empty; give the folder of a run")
        from vdtrain.report.page import check_page
        from vdtrain.report.report import write_report

        folders = [Path(folder) for folder in config.run_dirs]
        output = Path(config.output) if config.output is not None else folders[-1] / "report.html"
        place = f"output={config.output}" if config.output is not None else f"run_dirs={folders[-1]}"
        check_page(output, place, config.overwrite)
        evaluations = [Path(each) for each in config.evaluations]
        try:
            write_report(folders, output, evaluations, 1e6 * config.image_megabytes)
        except RecursionError as error:
            named = ", ".join(config.run_dirs)
            raise ConfigError(
                f"run_dirs={named}: a file there is nested too deeply; restore it, or remove it"
            ) from error
        print(f"takes: {', '.join(map(str, folders))}, into {output}", file=sys.stderr)
        print(output)
        return 0

    return run_command(USAGE, "report", ReportConfig, action, arguments, plain=PlainArguments(rest="run_dirs"))
