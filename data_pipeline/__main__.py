"""`vdtrain data COMMAND`, or `python -m data_pipeline COMMAND`: from published metadata to indexed tar shards."""

from __future__ import annotations

from vdtrain.run import signals

if __name__ == "__main__":
    signals.begin()  # before the slow imports

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.command_line import PlainArguments
from vdtrain.config.command_schema import DataPipelineConfig
from vdtrain.config.data_schema import DataConfig
from vdtrain.config.suggestions import meant
from vdtrain.errors import ConfigError, NothingError
from vdtrain.files import check_output

USAGE = """\
Usage: vdtrain data COMMAND [data=NAME] [SETTING=VALUE ...]
       python -m data_pipeline COMMAND [data=NAME] [SETTING=VALUE ...]

Prepare the data that training streams.

Commands:
{commands}

`vdtrain data COMMAND --help` lists the settings of a command. Run an interrupted command again: it continues, except
that select starts from the beginning.

Examples:
  python -m data_pipeline select data.select.filters.similarity_min=0.28
  python -m data_pipeline download data.download.processes=32
  python -m data_pipeline pack photos
  python -m data_pipeline pack coco data=coco2017
  python -m data_pipeline index data=own data.shards=my/shards
  python -m data_pipeline inspect data/manifest data.inspect.images=100
"""

COMMAND_USAGE = """\
Usage: vdtrain data {command} {plain}[data=NAME] [SETTING=VALUE ...]
       python -m data_pipeline {command} {plain}[data=NAME] [SETTING=VALUE ...]

{text}.
"""


def _outputs(folders: Mapping[str, str], beside: bool = False) -> None:
    """Refuse folders that cannot be written, before any work; `beside` if a lock lies next to each of them."""
    for setting, folder in folders.items():
        for place in (Path(folder), *[Path(folder).absolute().parent] * beside):
            check_output(place, f"{setting}={folder}")


def _check_sources(data: DataConfig) -> None:
    if not data.sources:
        raise ConfigError(f"data.sources: empty; data={data.name} has shards already, which index takes by data.shards")


def _select(data: DataConfig) -> None:
    from data_pipeline.select.select import select

    _check_sources(data)
    _outputs({"data.select.scratch": data.select.scratch}, beside=True)
    _outputs({f"data.sources.{name}.selected": source.selected for name, source in data.sources.items()})
    select(data)


def _download(data: DataConfig) -> None:
    from data_pipeline.download.download import download

    _check_sources(data)
    _outputs({f"data.sources.{name}.shards": source.shards for name, source in data.sources.items()})
    download(data.sources, data.download, data.allow_loopback)


def _pack(data: DataConfig) -> None:
    from data_pipeline.pack.pack import pack

    _outputs({"data.pack.output": data.pack.output}, beside=True)
    if data.pack.index:
        _outputs({"data.manifest": data.manifest}, beside=True)
    pack(data)
    if data.pack.index:
        _index(replace(data, shards=[data.pack.output]))


def _index(data: DataConfig) -> None:
    from data_pipeline.index.index import index

    _outputs({"data.manifest": data.manifest}, beside=True)
    for place in data.shards:
        if "://" in place:
            raise NothingError(f"data.shards={place}: is an address; copy its tars to this machine")
    sources = {name: Path(source.shards) for name, source in data.sources.items()}
    index(sources, Path(data.manifest), own=[Path(place) for place in data.shards], **vars(data.index))


def _inspect(data: DataConfig) -> None:
    from data_pipeline.inspection import inspect

    inspect(Path(data.manifest), data.inspect)


@dataclass(frozen=True)
class Command:
    """A command on data."""

    run: Callable[[DataConfig], None]
    text: str  # what it does, in a line of help
    parts: tuple[str, ...]  # of `data`, those that it reads
    plain: str | None = None  # the setting that its plain argument stands for
    data: str | None = None  # the option of `data` that it takes by default, if it is not that of the other commands


COMMANDS = {
    "select": Command(
        _select,
        "select the rows of the metadata that are worth their download",
        ("sources", "allow_loopback", "select"),
    ),
    "download": Command(
        _download,
        "download the selected images with img2dataset, as tar shards",
        ("sources", "allow_loopback", "download"),
    ),
    "pack": Command(_pack, "make shards of your own images and captions", ("pack",), "data.pack.input", "own"),
    "index": Command(
        _index,
        "check the shards and write the manifest that training streams from",
        ("sources", "shards", "manifest", "index"),
    ),
    "inspect": Command(
        _inspect,
        "report what a manifest holds, and draw some of its pairs on a contact sheet",
        ("manifest", "inspect"),
        "data.manifest",
    ),
}

# Commands of 0.1 that are now the miniature's.
MOVED = {"shapes": "draw data=shapes", "serve": "serve data=shapes"}

# The one command with settings of a model and of hardware beside those of data.
LATENTS, LATENTS_TEXT = (
    "latents",
    "encode the images with the image VAE, once (with gpus=8 on eight GPUs)",
)


def _usage() -> str:
    texts = {name: command.text for name, command in COMMANDS.items()} | {LATENTS: LATENTS_TEXT}
    order = ("select", "download", "pack", "index", LATENTS, "inspect")
    return USAGE.format(commands="\n".join(f"  {name:<10} {texts[name]}" for name in order))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    if argv is None:
        return signals.ended(signals.quietly(lambda: main(sys.argv[1:])))
    signals.ending.advice = "run it again to continue"
    arguments = list(argv)
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h"):
        print(_usage(), end="")
        return 0 if arguments else 2
    if name in MOVED:
        print(f"error: {name}: now `python -m miniature {MOVED[name]}`", file=sys.stderr)
        return 2
    if name not in (*COMMANDS, LATENTS):
        known = (*COMMANDS, LATENTS)
        print(f"error: unknown command {name!r}; choose from {', '.join(known)}{meant(name, known)}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s")
    if name == LATENTS:
        from data_pipeline.latents.latents import main as latents

        return latents(arguments[1:])
    return _run(name, arguments[1:])


def _run(name: str, argv: Sequence[str]) -> int:
    command = COMMANDS[name]

    def action(config: DataPipelineConfig, raw_config: DictConfig) -> int:
        from vdtrain.data.manifest import ManifestError

        try:
            command.run(config.data)
        except ManifestError as error:
            raise ConfigError(str(error)) from error
        return 0

    word = f"[{command.plain.rpartition('.')[2].upper()}] " if command.plain else ""
    usage = COMMAND_USAGE.format(command=name, plain=word, text=command.text[0].upper() + command.text[1:])
    plain = PlainArguments((command.plain,)) if command.plain else None
    parts = [f"data.{part}" for part in ("root", *command.parts)]
    argv = [f"data={command.data}"] * (command.data is not None) + [*argv]
    return run_command(usage, "data_pipeline", DataPipelineConfig, action, argv, plain=plain, parts=parts)


if __name__ == "__main__":
    sys.exit(main())
