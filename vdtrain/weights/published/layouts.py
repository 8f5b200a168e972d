"""Recognises published weights: what a file or folder holds, and the command that imports it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from torch import Tensor

from vdtrain.config.command_line import plain_path, shell
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights.imports import DEFAULT_MODEL, FOLDERS
from vdtrain.weights.tensor_files import SUFFIXES, LazyTensors, choose, open_tensors

LISTED_KEYS = 3
# What training leaves beside the weights: an EMA copy, and numbers that follow from the configuration.
LEFTOVERS = ("model_ema.", "loss.", "lvlb_weights", "logvar", "scale_factor", "v_pred", "ztsnr")


@dataclass(frozen=True)
class Layout:
    """One set of names for one kind of weights.

    Attributes:
        source: the source of `vdtrain weights import` that reads it.
        text: what it is, for people.
        marker: the end of a key that every such file has. The start of that key is the prefix of all keys.
        prefix: pattern of the allowed prefixes.
    """

    source: str
    text: str
    marker: str
    prefix: str = r"(.*\.)?"

    def prefixes(self, keys: Iterable[str]) -> list[str]:
        """The prefixes in a file: those of an EMA copy last, shorter ones first."""
        found = [key.removesuffix(self.marker) for key in keys if key.endswith(self.marker)]
        allowed = [prefix for prefix in found if re.fullmatch(self.prefix, prefix)]
        return sorted(allowed, key=lambda prefix: ("ema." in prefix, len(prefix)))


VD_2023 = Layout("versatile_diffusion", "Versatile Diffusion (2023)", "diffuser.image.time_embed.0.weight")
VD_2022 = Layout(
    "versatile_diffusion",
    "Versatile Diffusion (2022)",
    "model.diffusion_model.unet_image.input_blocks.0.0.weight",
)
# Alone or in the whole model. A ControlNet has the same layers under another prefix.
COMPVIS = Layout(
    "stable_diffusion", "Stable Diffusion's U-Net", "input_blocks.0.0.weight", r"((.*\.)?diffusion_model\.)?"
)
EMA_UNET = Layout(
    "stable_diffusion",
    "Stable Diffusion's EMA U-Net",
    "model_ema.diffusion_modelinput_blocks00weight",
)
DIFFUSERS = Layout("stable_diffusion", "Stable Diffusion's U-Net by diffusers", "time_embedding.linear_1.weight")
IMAGE_VAE = Layout("image_vae", "the image VAE", "decoder.conv_in.weight")
TEXT_VAE = Layout("text_vae", "the text VAE", "decoder.transformer.wpe.weight")
CLIP = Layout("clip", "CLIP", "vision_model.embeddings.class_embedding")
OPEN_CLIP = Layout("clip", "CLIP by open_clip", "visual.class_embedding")
LAYOUTS = (VD_2023, VD_2022, COMPVIS, DIFFUSERS, EMA_UNET, IMAGE_VAE, TEXT_VAE, CLIP, OPEN_CLIP)


def recognised(keys: Iterable[str]) -> list[Layout]:
    """The layouts in a file, by its keys. The layout of the file as a whole comes first."""
    names = list(keys)
    return [layout for layout in LAYOUTS if layout.prefixes(names)]


def contents(keys: Iterable[str]) -> str:
    """A short description of what a file holds, by its keys."""
    names = list(keys)
    if layouts := recognised(names):
        return ", ".join(f"{layout.text} (`vdtrain weights import {layout.source}`)" for layout in layouts)
    listed = ", ".join(name[:80] for name in names[:LISTED_KEYS])
    return f"{len(names)} tensors such as {listed}" if names else "no tensors"


def below(tensors: Mapping[str, Tensor], prefix: str) -> LazyTensors:
    """The tensors below a prefix, by names without the prefix. What training leaves beside the weights is dropped."""
    keys = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    return LazyTensors.of(tensors).renamed({name: key for name, key in keys.items() if not name.startswith(LEFTOVERS)})


def ema_name(key: str) -> str:
    """The key of a weight's EMA copy. CompVis' code removes the dots."""
    return "model_ema." + re.sub(r"^model\.", "", key).replace(".", "")


def pipeline_source(folder: Path) -> str | None:
    """The source that reads a folder of a diffusers pipeline; None for any other path."""
    if (folder / "image_unet").is_dir() and (folder / "text_unet").is_dir():
        return "diffusers"
    return "stable_diffusion" if (folder / "unet").is_dir() else None


def is_published(path: Path) -> bool:
    """Whether a path is published weights, or has the name of a weights file."""
    if not path.is_dir():
        return path.is_file() or path.suffix in SUFFIXES
    return pipeline_source(path) is not None or choose(file.name for file in path.iterdir()) is not None


def import_first(setting: str, value: str, model: str | None = None) -> WeightsError:
    """The error for a setting that names published weights, with the command that imports them.

    Args:
        model: name of the model that needs the weights; None for the full-size model.

    Raises:
        WeightsError: the weights cannot be read at all.
    """
    path = Path(value).expanduser()
    place = f"{setting}={value}"
    if not path.exists():
        return WeightsError(
            f"{place}: no such file; import published weights first, with `vdtrain weights import "
            "stable_diffusion FILE` or `vdtrain weights import versatile_diffusion FILE`"
        )
    source, text = pipeline_source(path) if path.is_dir() else None, "a diffusers pipeline"
    if source is None:
        keys = list(open_tensors(path, setting))
        layout = next((each for each in recognised(keys) if each.source in FOLDERS), None)
        if layout is None:
            return WeightsError(f"{place}: holds {contents(keys)}, but no diffuser; give the weights of a diffuser")
        source, text = layout.source, layout.text
    output = _free_folder(source, path)
    words = ["vdtrain", "weights", "import", source, plain_path(value)]
    words += [f"model={model}"] if model not in (None, DEFAULT_MODEL) else []
    words += [f"output={output}"] if str(output) != FOLDERS[source] else []
    return WeightsError(f"{place}: holds {text}; import it once: `{shell(words)}`; then give {setting}={output}")


def import_of(folder: Path) -> str:
    """The command that makes a missing weights folder."""
    source = next((name for name, default in FOLDERS.items() if default == str(folder)), None)
    return "vdtrain weights import" + (f" {source}" if source else "")


def _free_folder(source: str, path: Path) -> Path:
    """A folder for the import that does not exist yet."""
    stem = path.name if path.is_dir() else path.stem
    plain = "".join(each if each.isalnum() or each in "-_." else "_" for each in stem).strip(".") or source
    numbered = (Path(f"weights/{plain}-{number}") for number in count(2))
    candidates = chain([Path(FOLDERS[source]), Path("weights", plain)], numbered)
    return next(folder for folder in candidates if not folder.exists())
