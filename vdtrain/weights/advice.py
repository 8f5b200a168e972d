"""What to do with published weights where imported ones are wanted: the command for that very file."""

from __future__ import annotations

from itertools import chain, count
from pathlib import Path

from vdtrain.command_line import plain_path, shell
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights.catalogue import SOURCES
from vdtrain.weights.file_choice import SUFFIXES, choose
from vdtrain.weights.layouts import contents, recognised
from vdtrain.weights.tensor_files import open_tensors

DEFAULT_MODEL = "versatile_diffusion"


def is_published(path: Path) -> bool:
    """Whether a path is, or by its name would be, weights as others publish them."""
    if not path.is_dir():
        return path.is_file() or path.suffix in SUFFIXES
    return pipeline_source(path) is not None or choose(file.name for file in path.iterdir()) is not None


def import_first(setting: str, value: str, model: str | None = None) -> WeightsError:
    """The error of a setting that names published weights.

    Args:
        model: that the weights are wanted for, by name; None for the one of full size.

    Raises:
        WeightsError: they cannot be read at all.
    """
    path = Path(value).expanduser()
    what = f"{setting}={value}"
    if not path.exists():
        return WeightsError(
            f"{what}: no such file; one of published weights is imported first, by `vdtrain weights import "
            "stable_diffusion FILE` or `vdtrain weights import versatile_diffusion FILE`"
        )
    source, text = pipeline_source(path) if path.is_dir() else None, "a pipeline of diffusers"
    if source is None:
        keys = list(open_tensors(path, setting))
        layouts = recognised(keys)
        layout = next((each for each in layouts if SOURCES[each.source].output), None)
        if layout is None:
            return WeightsError(f"{what}: holds {contents(keys)}, and no diffuser; give weights of one")
        source, text = layout.source, layout.text
    output = _free(source, path)
    words = ["vdtrain", "weights", "import", source, plain_path(value)]
    words += [f"model={model}"] if model not in (None, DEFAULT_MODEL) else []
    words += [f"output={output}"] if str(output) != SOURCES[source].output else []
    return WeightsError(f"{what}: holds {text}, which is imported once: `{shell(words)}`; then give {setting}={output}")


def pipeline_source(folder: Path) -> str | None:
    """The source that reads a folder of one of diffusers' pipelines; None for any other path."""
    if (folder / "image_unet").is_dir() and (folder / "text_unet").is_dir():
        return "diffusers"
    return "stable_diffusion" if (folder / "unet").is_dir() else None


def import_of(folder: Path) -> str:
    """The command that makes a weights folder which is not there."""
    source = next((name for name, each in SOURCES.items() if each.output == str(folder)), None)
    return "vdtrain weights import" + (f" {source}" if source else "")


def _free(source: str, path: Path) -> Path:
    """Where the import can go without replacing anything."""
    stem = path.name if path.is_dir() else path.stem
    plain = "".join(each if each.isalnum() or each in "-_." else "_" for each in stem).strip(".") or source
    numbered = (Path(f"weights/{plain}-{number}") for number in count(2))
    places = chain([Path(SOURCES[source].output or plain), Path("weights", plain)], numbered)
    return next(place for place in places if not place.exists())
