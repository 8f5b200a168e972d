"""Import published weights, export trained ones, and send an export to the Hugging Face hub."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.command_line import CommandLine, PlainArguments
from vdtrain.config.command_schema import WeightsConfig
from vdtrain.config.overrides import Override
from vdtrain.config.suggestions import meant
from vdtrain.errors import ConfigError
from vdtrain.files import refuse_existing
from vdtrain.weights.exports import FORMATS, PRECISIONS, card_beside
from vdtrain.weights.imports import ADDRESSES, FOLDERS, SOURCES

USAGE = """\
Usage: vdtrain weights import SOURCE [PATH] [SETTING=VALUE ...]
       vdtrain weights import all [PATH ...] [SOURCE:PATH ...] [SETTING=VALUE ...]
       vdtrain weights export FORMAT OUTPUT [CHECKPOINT] [SETTING=VALUE ...]
       vdtrain weights push EXPORT repo=NAMESPACE/NAME [private=true] [dry_run=true]

Import published weights from any of their published layouts, and export trained ones. Names and shapes are checked
against the model before anything is written. No code in a file is run. A result appears complete or not at all.

Import. PATH is a file or folder, or hf:ORG/REPO[/FILE_OR_FOLDER]@COMMIT; a source with an address needs none.
{sources}

  all imports what training starts from: the frozen parts and model.base_weights. A part that is there already is left
  as it is, so that the same command goes on after an interruption. PATH may be a folder with several of them.

  The diffuser goes to `output`, a weights folder that stage.init_from, model.base_weights and checkpoint= read. A
  frozen part goes where the model's configuration reads it. Precision is kept.

Export. OUTPUT is the file or folder to make. Write a path that looks like a setting, a=b, as ./a=b.
{formats}

  README.md in it (for a .pth, NAME.README.md beside it) is a model card: how to load it, stages, data, figures of the
  evaluations in the run folder, licences. license=NAME puts a licence of yours in its head.

Push. Sends an export's safetensors, descriptions and model card to the Hugging Face hub, and nothing else. The token is
that of HF_TOKEN or of `hf auth login`. dry_run=true lists the files. No pickle is sent.

Examples:
  vdtrain weights import all
  vdtrain weights import stable_diffusion
  vdtrain weights import stable_diffusion sd-v1-4.ckpt
  vdtrain weights import image_vae hf:shi-labs/versatile-diffusion/vae@2926f8e11ea526b562cd592b099fcf9c2985d0b7
  vdtrain weights import versatile_diffusion vd-four-flow-v1-0-fp16.pth output=weights/released
  vdtrain sample weights/released "a lighthouse at dusk, in oil" device=cuda
  vdtrain weights export versatile_diffusion my-vd.pth runs/stage3_four_flow weights=ema precision=fp16
  vdtrain weights export safetensors my-vd weights/released
  vdtrain weights export diffusers my-vd-diffusers runs/stage3_four_flow
  vdtrain weights push my-vd-diffusers repo=me/my-vd private=true dry_run=true
"""


def _usage() -> str:
    sources, formats = [], [_line(name, write) for name, write in FORMATS.items()]
    for name, read in SOURCES.items():
        sources.append(_line(name, read))
        sources += [f"  {'':<21}  from {ADDRESSES[name]}"] if name in ADDRESSES else []
        sources += [f"  {'':<21}  to {FOLDERS[name]}"] if name in FOLDERS else []
    return USAGE.format(sources="\n".join(sources), formats="\n".join(formats))


def _line(name: str, function: Callable[..., object]) -> str:
    """A name, and the first line of its function's docstring."""
    return f"  {name:<21}{(function.__doc__ or '').splitlines()[0].removesuffix('.')}"


ALL = "all"
Action = Callable[[WeightsConfig], int]


def parse(words: Sequence[str]) -> Action:
    """The action that the plain arguments of a command line ask for.

    Raises:
        ConfigError: no such command, source or format, or a wrong number of arguments.
    """
    command, name, *rest = [*words, "", ""][: max(2, len(words))]
    if command == "import":
        if name == ALL:
            return partial(_import_all, rest)
        if name not in SOURCES:
            raise ConfigError(
                f"import {name}: no such source; choose from {', '.join((*SOURCES, ALL))}{meant(name, SOURCES)}"
            )
        path = rest[0] if rest else ADDRESSES.get(name)
        if path is None or len(rest) > 1:
            raise ConfigError(f"import {name}: takes one path, got {len(rest)}; give the file or folder to import")
        return partial(import_weights, name, path)
    if command == "export":
        if name not in FORMATS:
            raise ConfigError(f"export {name}: no such format; choose from {', '.join(FORMATS)}{meant(name, FORMATS)}")
        if len(rest) != 1:
            raise ConfigError(f"export {name}: takes one output, got {len(rest)}; give the file or folder to make")
        return partial(export_weights, name, Path(rest[0]).expanduser())
    if command == "push":
        if not name or rest:
            raise ConfigError(f"push: takes one export, got {len(rest) + bool(name)}; give the folder to send")
        return partial(push_weights, name)
    raise ConfigError(
        f"weights{command and f' {command}'}: choose import, export or push (see vdtrain weights --help)"
        f"{meant(command, ('import', 'export', 'push'))}"
    )


def _import_all(given: Sequence[str], config: WeightsConfig) -> int:
    from vdtrain.weights.import_all import import_all

    return import_all(given, config)


def import_weights(name: str, path: str, config: WeightsConfig) -> int:
    """Import from a source by name; returns the exit status."""
    if config.output and name not in FOLDERS:
        raise ConfigError(f"output={config.output}: {name} goes where the model reads it; set that setting instead")
    if name in FOLDERS:
        output = Path(config.output or FOLDERS[name]).expanduser()
        _refuse_name(output, "a weights folder")
        config = replace(config, output=str(output))
    for made in SOURCES[name](path, config):
        made.write()
        print(f"{made.path}  ({made.summary}; for model={config.model.name}, from {path})")
    return 0


def export_weights(name: str, output: Path, config: WeightsConfig) -> int:
    """Export in a format by name; returns the exit status."""
    place = f"output={output}"
    if name == "versatile_diffusion":
        if output.suffix in (".safetensors", ".json"):
            raise ConfigError(f"{place}: the result is a PyTorch file; end its name with .pth")
        refuse_existing(output, place, config.overwrite)
        refuse_existing(card_beside(output), place, config.overwrite)
    else:
        from vdtrain.weights.folder import is_export

        _refuse_name(output, "a folder")
        refuse_existing(output, place, config.overwrite, ours=is_export)
    import torch

    from vdtrain.training.start import open_weights
    from vdtrain.weights.model_card import card, origin_of
    from vdtrain.weights.tensor_files import LazyTensors

    model, weights = open_weights("checkpoint", config.checkpoint, config.weights, config.trust)
    said = f"{config.checkpoint} ({config.weights}), as {name} in {config.precision}, into {output}"
    print(f"takes: {said}", file=sys.stderr, flush=True)
    dtype = PRECISIONS[config.precision]
    tensors = LazyTensors.of(weights).cast(getattr(torch, dtype) if dtype else None)
    text = card(name, output.name, tensors, model, origin_of(config.checkpoint), config.license)
    FORMATS[name](output, tensors, model, config.overwrite, text)
    print(f"{output}  ({tensors.summary})")
    return 0


def push_weights(export: str, config: WeightsConfig) -> int:
    """Send an export to the hub; returns the exit status."""
    from vdtrain.weights.hub import push

    return push(export, config)


def _refuse_name(output: Path, what: str) -> None:
    from vdtrain.weights.tensor_files import SUFFIXES

    if output.suffix in SUFFIXES:
        raise ConfigError(f"output={output}: the result is {what}, not a file; leave out {output.suffix}")


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain weights`; returns its exit status."""
    asked: list[Action] = []

    def plain(line: CommandLine) -> list[Override]:
        words = line.plain
        # `--cfg job` needs no words.
        if words or not line.print:
            asked.append(parse(words[:3] if words[:1] == ["export"] else words))
        return PlainArguments(("checkpoint",))(replace(line, plain=words[3:] if words[:1] == ["export"] else []))

    def action(config: WeightsConfig, raw_config: DictConfig) -> int:
        return asked[0](config)

    return run_command(_usage(), "weights", WeightsConfig, action, arguments, plain=plain)
