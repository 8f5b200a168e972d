"""Published diffusers by our names, checked against the model's configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdtrain.config.schema import ModelConfig
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import Diffuser, layer_group
from vdtrain.models.frozen_weights import WeightsError, compare
from vdtrain.models.layer_plan import make_plan
from vdtrain.weights.diffusers_folder import open_pipeline
from vdtrain.weights.folder import is_weights_folder, open_weights_folder
from vdtrain.weights.frozen_sources import CLIP, IMAGE_VAE, TEXT_VAE, Convert, FrozenPart, clip, image_vae, text_vae
from vdtrain.weights.layouts import VD_2022, VD_2023, below, contents
from vdtrain.weights.schedule_buffers import check_schedule, schedule_buffers
from vdtrain.weights.stable_diffusion import UNET_PREFIX, open_stable_diffusion
from vdtrain.weights.tensor_files import LazyTensors, open_tensors
from vdtrain.weights.versatile_diffusion import from_2022, from_released

# Prefix -> the frozen part whose weights are below it, in files of the whole model. Longer prefixes come first.
WHOLE_2022: dict[str, tuple[FrozenPart, Convert]] = {
    "autokl.": (IMAGE_VAE, image_vae),
    "optimus.": (TEXT_VAE, text_vae),
    "clip.model.": (CLIP, clip),
    "clip.": (CLIP, clip),
}
WHOLE_2023: dict[str, tuple[FrozenPart, Convert]] = {
    "vae.image.": (IMAGE_VAE, image_vae),
    "vae.text.": (TEXT_VAE, text_vae),
    "ctx.text.model.": (CLIP, clip),
    # The same CLIP again.
    "ctx.image.model.": (CLIP, clip),
}


@dataclass(frozen=True)
class Opened:
    """What a published file holds: the diffuser by our names, and frozen parts, each with what converts it."""

    diffuser: LazyTensors
    frozen: tuple[tuple[FrozenPart, Convert, LazyTensors], ...] = ()


def versatile_diffusion(path: Path, model: ModelConfig, setting: str = "path") -> Opened:
    """The released file: of February 2023 (the diffuser alone), of November 2022 (with its frozen parts), or a whole
    model's state dict in the later layout.

    Raises:
        WeightsError: it is not, or is not of the configured model and noise schedule.
    """
    place = f"{setting}={path}"
    published = open_tensors(path, setting)
    releases = [layout for layout in (VD_2022, VD_2023) if layout.prefixes(published)]
    if not releases:
        raise WeightsError(
            f"{place}: no keys below {UNET_PREFIX}unet_image or diffuser.; it holds {contents(published)}, and this is "
            "no release of Versatile Diffusion"
        )
    first_release = releases[0] is VD_2022
    tensors = below(published, releases[0].prefixes(published)[0])
    whole = WHOLE_2022 if first_release else WHOLE_2023
    plan = make_plan(model.diffuser)
    buffers = schedule_buffers(model.schedule)
    names: dict[str, str] = {}
    frozen: dict[str, dict[str, str]] = {prefix: {} for prefix in whole}
    foreign = []
    for key in tensors:
        prefix = next((prefix for prefix in whole if key.startswith(prefix)), None)
        if prefix is not None:
            frozen[prefix][key.removeprefix(prefix)] = key
        elif (name := from_2022(plan, key) if first_release else from_released(key)) is not None:
            names[name] = key
        elif key not in buffers:
            foreign.append(key)
    if foreign:
        raise WeightsError(f"{place}: {foreign[0]} has no place in the model; is it a release of Versatile Diffusion?")
    check_schedule(published, model.schedule, place, path)
    diffuser = tensors.renamed(names)
    check_diffuser(diffuser, model, active_groups(all_flows(model.modalities)), place)
    parts: dict[FrozenPart, tuple[Convert, LazyTensors]] = {}
    for prefix, keys in frozen.items():
        if keys:
            part, convert = whole[prefix]
            found = tensors.renamed(keys)
            if part in parts and not _equal(parts[part][1], found):
                raise WeightsError(f"{place}: {prefix}* is another CLIP than the one before it, and the model has one")
            parts.setdefault(part, (convert, found))
    return Opened(diffuser, tuple((part, convert, found) for part, (convert, found) in parts.items()))


def stable_diffusion(path: Path, model: ModelConfig, setting: str = "path") -> Opened:
    """Stable Diffusion v1: CompVis' file, or diffusers' U-Net.

    Raises:
        WeightsError: it is not, or is not of the configured model and noise schedule.
    """
    return Opened(open_stable_diffusion(path, model, list(model.modalities), setting))


def diffusers(path: Path, model: ModelConfig, setting: str = "path") -> Opened:
    """The diffuser of a folder of `VersatileDiffusionPipeline`."""
    tensors = open_pipeline(path, model, setting)
    check_schedule(LazyTensors({}), model.schedule, f"{setting}={path}", path, path)
    return Opened(tensors)


def safetensors(path: Path, model: ModelConfig, setting: str = "path") -> Opened:
    """A weights folder, with whole layer groups: all of them, or those that a stage has trained so far."""
    if not is_weights_folder(path):
        raise WeightsError(f"{setting}={path}: no weights folder; give what `vdtrain weights export safetensors` wrote")
    tensors = open_weights_folder(path, setting)
    check_diffuser(tensors, model, {layer_group(name) for name in tensors}, f"{setting}={path}")
    return Opened(tensors)


def check_diffuser(tensors: LazyTensors, model: ModelConfig, groups: Collection[str], place: str) -> None:
    """Compare names and shapes with those of the layer groups.

    Raises:
        WeightsError: with what differs.
    """
    with torch.device("meta"):
        expected = Diffuser(model, groups).state_dict()
    if differences := compare(expected, tensors.outline()):
        raise WeightsError(f"{place}: weights of another model than model={model.name}: {differences}")


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
