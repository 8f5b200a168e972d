"""Versatile Diffusion as released: the names of both releases, and the diffuser and frozen parts in a file.

2023: `diffuser.image.time_embed.*`, `diffuser.<m>.data_blocks.<n>.0.*`, `diffuser.<m>.context_blocks.<n>.0.*`.
Ours: `global_layers.*`, `data_layers.<m>.<n>.*`, `context_layers.<m>.<n>.*`; the rest of a name is the same in both.
2022: `model.diffusion_model.unet_<m>.*`, with the names of CompVis' U-Net.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vdtrain.config.schema import ModelConfig
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.models.layer_plan import LayerPlan, make_plan
from vdtrain.weights.published.checks import check_diffuser, check_schedule, schedule_buffers
from vdtrain.weights.published.diffusers_names import translated
from vdtrain.weights.published.layouts import VD_2022, VD_2023, below, contents
from vdtrain.weights.published.stable_diffusion import UNET_PREFIX, compvis_modules
from vdtrain.weights.tensor_files import LazyTensors, equal, open_tensors

if TYPE_CHECKING:
    from vdtrain.weights.frozen_parts import FrozenPart

GLOBAL_PREFIX = "diffuser.image.time_embed."
RELEASED_LAYER = re.compile(r"diffuser\.(\w+)\.(data|context)_blocks\.(\d+)\.0\.(.+)")
OWN_LAYER = re.compile(r"(data|context)_layers\.(\w+)\.(\d+)\.(.+)")


def modules_2022(plan: LayerPlan, modalities: Iterable[str]) -> dict[str, str]:
    """Our name of each module by that of the 2022 release; for `translated`."""
    # The global layers are outside the networks of the modalities.
    found = {f"{UNET_PREFIX}time_embed": "global_layers"}
    for name in modalities:
        modules = compvis_modules(plan, name)
        del modules["global_layers"]
        found |= {f"{UNET_PREFIX}unet_{name}.{theirs}": own for own, theirs in modules.items()}
    return found


def from_released(key: str) -> str | None:
    """Our name of a key of the 2023 release; None if it is not a key of the diffuser (the schedule's buffers)."""
    if key.startswith(GLOBAL_PREFIX):
        return "global_layers." + key.removeprefix(GLOBAL_PREFIX)
    match = RELEASED_LAYER.fullmatch(key)
    if match is None:
        return None
    modality, kind, index, tail = match.groups()
    return f"{kind}_layers.{modality}.{index}.{tail}"


def to_released(name: str) -> str:
    """The key of one of our parameter names in the 2023 release.

    Raises:
        ValueError: the name is not a parameter of the diffuser.
    """
    if name.startswith("global_layers."):
        return GLOBAL_PREFIX + name.removeprefix("global_layers.")
    match = OWN_LAYER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not a parameter of the diffuser")
    kind, modality, index, tail = match.groups()
    return f"diffuser.{modality}.{kind}_blocks.{index}.0.{tail}"


def open_release(path: Path, model: ModelConfig, setting: str) -> tuple[LazyTensors, dict[FrozenPart, LazyTensors]]:
    """The diffuser by our names, and the published tensors of each frozen part in the same file.

    Args:
        path: the file of February 2023 (the diffuser alone), the file of November 2022 (with its frozen parts), or a
            whole model's state dict in the later layout.
        setting: names where the path comes from, in errors.

    Raises:
        WeightsError: the file is not a release, or is of another model or noise schedule.
    """
    place = f"{setting}={path}"
    published = open_tensors(path, setting)
    releases = [layout for layout in (VD_2022, VD_2023) if layout.prefixes(published)]
    if not releases:
        raise WeightsError(
            f"{place}: no keys below {UNET_PREFIX}unet_image or diffuser.; it holds {contents(published)}, not a "
            "release of Versatile Diffusion"
        )
    tensors = below(published, releases[0].prefixes(published)[0])
    modules, buffers = modules_2022(make_plan(model.diffuser), model.modalities), schedule_buffers(model.schedule)
    prefixes = _frozen_prefixes(releases[0] is VD_2022)
    names: dict[str, str] = {}
    frozen: dict[str, dict[str, str]] = {prefix: {} for prefix in prefixes}
    for key in tensors:
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is not None:
            frozen[prefix][key.removeprefix(prefix)] = key
        elif (name := translated(key, modules) if releases[0] is VD_2022 else from_released(key)) is not None:
            names[name] = key
        elif key not in buffers:
            raise WeightsError(f"{place}: {key} has no place in the model; is it a release of Versatile Diffusion?")
    check_schedule(published, model.schedule, place, path)
    diffuser = tensors.renamed(names)
    check_diffuser(diffuser, model, active_groups(all_flows(model.modalities)), place)
    parts: dict[FrozenPart, LazyTensors] = {}
    for prefix, keys in frozen.items():
        if keys:
            part, found = prefixes[prefix], tensors.renamed(keys)
            if part in parts and not equal(parts[part], found):
                raise WeightsError(f"{place}: {prefix}* differs from the CLIP before it, and the model has one CLIP")
            parts.setdefault(part, found)
    return diffuser, parts


def _frozen_prefixes(first_release: bool) -> dict[str, FrozenPart]:
    """The frozen part below each prefix in a file of the whole model; longer prefixes come first."""
    # Imports the classes of all parts, and the names above do not need them.
    from vdtrain.weights.frozen_parts import CLIP, IMAGE_VAE, TEXT_VAE

    if first_release:
        return {"autokl.": IMAGE_VAE, "optimus.": TEXT_VAE, "clip.model.": CLIP, "clip.": CLIP}
    # The two CLIPs are the same.
    return {"vae.image.": IMAGE_VAE, "vae.text.": TEXT_VAE, "ctx.text.model.": CLIP, "ctx.image.model.": CLIP}
