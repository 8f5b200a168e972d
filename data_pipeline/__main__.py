"""`python -m data_pipeline COMMAND`: from published metadata to indexed tar shards."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from vdtrain.config.command_line import PlainArguments
from vdtrain.config.compose import ConfigError, run_command
from vdtrain.config.data_schema import DataConfig
from vdtrain.config.schema import DataPipelineConfig
from vdtrain.files import check_output

USAGE = """\
Usage: python -m data_pipeline COMMAND [data=NAME] [SETTING=VALUE ...]

Commands:
  select     choose the rows of the metadata that are worth their download
  download   fetch the images of every source with img2dataset, into tar shards
  index      check the shards and write the manifest that training streams from
  latents    encode the images with the image VAE, once (also by torchrun or srun: latents --help)
  inspect    say what a manifest holds, and draw some of its pairs on a contact sheet: inspect [MANIFEST]

Every command takes up what an earlier, interrupted run left complete.

  --help              this text
  --cfg job           print the configuration and stop

Examples:
  python -m data_pipeline select data.select.filters.similarity_min=0.28
  python -m data_pipeline download data.download.processes=32
  python -m data_pipeline index data=shapes
  python -m data_pipeline inspect data/manifest data.inspect.images=100
"""


def _outputs(folders: Mapping[str, str], beside: bool = False) -> None:
    """Refuse folders that cannot be written, before any work.

    Args:
        beside: a lock lies next to each of them.
    """
    for setting, folder in folders.items():
        for place in (Path(folder), *[Path(folder).absolute().parent] * beside):
            check_output(place, f"{setting}={folder}")


def _select(data: DataConfig) -> None:
    from data_pipeline.select.select import select

    _outputs({"data.select.scratch": data.select.scratch}, beside=True)
    _outputs({f"data.sources.{name}.selected": source.selected for name, source in data.sources.items()})
    select(data)


def _download(data: DataConfig) -> None:
    from data_pipeline.download.download import DownloadError, download

    _outputs({f"data.sources.{name}.shards": source.shards for name, source in data.sources.items()})
    try:
        download(data.sources, data.download, data.allow_loopback)
    except DownloadError as error:
        raise ConfigError(str(error)) from error


def _index(data: DataConfig) -> None:
    from data_pipeline.index.index import index
    from data_pipeline.index.shard_reading import ShardError
    from vdtrain.data.manifest import ManifestError

    settings = data.index
    if settings.processes < 1:
        raise ConfigError(f"data.index.processes={settings.processes}: must be at least 1")
    _outputs({"data.manifest": data.manifest}, beside=True)
    sources = {name: Path(source.shards) for name, source in data.sources.items()}
    try:
        index(sources, Path(data.manifest), processes=settings.processes, decode=settings.decode)
    except (ShardError, ManifestError) as error:
        raise ConfigError(str(error)) from error


def _inspect(data: DataConfig) -> None:
    from data_pipeline.inspect.inspection import inspect
    from vdtrain.data.manifest import ManifestError

    try:
        inspect(Path(data.manifest), data.inspect)
    except ManifestError as error:
        raise ConfigError(str(error)) from error


COMMANDS: dict[str, Callable[[DataConfig], None]] = {
    "select": _select,
    "download": _download,
    "index": _index,
    "inspect": _inspect,
}

# Commands of 0.1 that are now the miniature's.
MOVED = {"shapes": "draw data=shapes", "serve": "serve data=shapes"}

# The one command with settings of a model and of hardware beside those of data.
LATENTS = "latents"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("--help", "-h"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if command in MOVED:
        print(f"error: {command}: now `python -m miniature {MOVED[command]}`", file=sys.stderr)
        return 2
    if command not in (*COMMANDS, LATENTS):
        print(f"error: {command!r} is no command; choose one of {', '.join((*COMMANDS, LATENTS))}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s")

    def action(config: DataPipelineConfig, document: DictConfig) -> int:
        COMMANDS[command](config.data)
        return 0

    try:
        if command == LATENTS:
            from data_pipeline.latents.latents import main as latents

            return latents(arguments[1:])
        plain = PlainArguments(("data.manifest",)) if command == "inspect" else None
        return run_command(USAGE, "data_pipeline", DataPipelineConfig, action, arguments[1:], plain=plain)
    except KeyboardInterrupt:
        print("stopped; run it again to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
