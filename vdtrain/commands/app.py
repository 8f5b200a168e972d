"""Sample, blend and edit in a page in the browser."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.command_line import PlainArguments
from vdtrain.config.command_schema import AppConfig
from vdtrain.errors import ConfigError, missing

USAGE = """\
Usage: vdtrain app CHECKPOINT [SETTING=VALUE ...]

Serve a page on which a model makes images and captions: the four flows, blends of several texts and images,
disentanglement of content and style, and editing. The page asks one model in memory, one request after another. It
loads nothing from elsewhere and tells nobody of its use. It is served to this machine alone, unless host= says
otherwise. The settings are those that stand in the page at first. Ctrl-C ends it.

Examples:
  vdtrain app runs/stage3_four_flow
  vdtrain app runs/stage3_four_flow device=cuda precision=fp16 solver=dpm-solver++ steps=20
  vdtrain app runs/stage3_four_flow port=8080
"""


def app(config: AppConfig, raw_config: DictConfig) -> int:
    """Serve the page until a signal; returns the exit status."""
    if (line := missing("gradio")) is not None:
        raise ConfigError(f"app: {line}")
    from vdtrain.app.server import serve

    return serve(config)


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain app`; returns its exit status."""
    return run_command(USAGE, "app", AppConfig, app, arguments, plain=PlainArguments(("checkpoint",)))
