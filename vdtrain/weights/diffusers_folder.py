"""A whole model as a folder that diffusers' Versatile Diffusion pipelines load, and the diffuser out of such a folder.

pipeline = diffusers.VersatileDiffusionPipeline.from_pretrained(folder)

The published folder shi-labs/versatile-diffusion has the same layout. A diffusers pipeline makes images alone, so the
text VAE is not part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vdtrain.config.schema import ModelConfig
from vdtrain.files import refuse_existing, written_whole
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import Diffuser, layer_group
from vdtrain.models.frozen_weights import WeightsError, compare
from vdtrain.models.image_layers import ImageDataLayers
from vdtrain.models.layer_plan import NORM_EPSILON
from vdtrain.models.text_layers import FlatLinear, TextDataLayers
from vdtrain.weights.diffusers_names import IMAGE_SIDE, MODEL_STEM, UnetNames
from vdtrain.weights.folder import write_shards
from vdtrain.weights.tensor_files import LazyTensors

INDEX_FILE = "model_index.json"
FLAT_UNET_MODULE = "diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet"
"""Where the text U-Net's class is. The published folder gives it as "versatile_diffusion", which no longer resolves."""
FLAT_TOKENS = 4
"""The tokens that a text state is split into; a constant of the text U-Net's class."""
COMPONENTS = {
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "image_feature_extractor": ("transformers", "CLIPImageProcessor"),
    "image_unet": ("diffusers", "UNet2DConditionModel"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_unet": (FLAT_UNET_MODULE, "UNetFlatConditionModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def write_pipeline(
    folder: Path, tensors: Mapping[str, Tensor], model: ModelConfig, setting: str = "folder", overwrite: bool = False
) -> None:
    """Write the diffuser and the configured frozen parts. The folder appears when it is whole.

    Args:
        tensors: all of the diffuser by our names; each is read when it is written, and keeps its dtype. The frozen
            parts are written in the dtype of the global layers.
        setting: names where the folder comes from, in errors.
        overwrite: replace what is there.

    Raises:
        ConfigError: the folder exists already, or cannot be written.
        WeightsError: layers are missing, or the model has a part that diffusers cannot run.
    """
    # Takes ten seconds, and reading a folder does not need it.
    from vdtrain.weights import diffusers_frozen

    place = f"{setting}={folder}"
    refuse_existing(folder, place, overwrite)
    diffuser, unets = _unets(model)
    tensors = LazyTensors.of(tensors)
    _check(place, diffuser, tensors)
    dtype = tensors.entries["global_layers.0.weight"].dtype
    image, text = unets["image_unet"].data, unets["text_unet"].data
    with written_whole(folder, place, overwrite) as draft:
        for part, names in unets.items():
            (draft / part).mkdir(parents=True)
            _unet(model, diffuser, names).save_config(draft / part)
            keys = {name: names.to_diffusers(name) for name in tensors}
            write_shards(draft / part, MODEL_STEM, ((key, tensors[name]) for name, key in keys.items() if key))
        diffusers_frozen.write_vae(draft / "vae", model, image, dtype)
        diffusers_frozen.write_text_encoder(draft / "text_encoder", draft / "tokenizer", model, text, dtype)
        diffusers_frozen.write_image_encoder(
            draft / "image_encoder", draft / "image_feature_extractor", model, image, dtype
        )
        diffusers_frozen.write_scheduler(draft / "scheduler", model.schedule)
        (draft / INDEX_FILE).write_text(json.dumps(_index(), indent=2))


def open_pipeline(folder: Path, model: ModelConfig, setting: str = "folder") -> LazyTensors:
    """The diffuser in a folder that `write_pipeline` or diffusers wrote, by our names; a tensor is read on access.

    Raises:
        WeightsError: no such folder, or one of another model.
    """
    diffuser, unets = _unets(model)
    parts = {part: names.open(folder / part, model.diffuser, setting) for part, names in unets.items()}
    image, text = parts.values()
    for name in sorted(set(image) & set(text)):
        if not torch.equal(image[name], text[name]):
            raise WeightsError(
                f"{setting}={folder}: {unets['image_unet'].to_diffusers(name)} differs between image_unet and "
                "text_unet, which share their time embedding in Versatile Diffusion"
            )
    tensors = LazyTensors(text.entries | image.entries)
    _check(f"{setting}={folder}", diffuser, tensors)
    return tensors


def _unets(model: ModelConfig) -> tuple[Diffuser, dict[str, UnetNames]]:
    """The whole diffuser on the meta device, and the names of the two U-Nets that hold it in diffusers."""
    with torch.device("meta"):
        diffuser = Diffuser(model, active_groups(all_flows(model.modalities)))
    found: dict[type, str] = {type(layers): name for name, layers in diffuser.data_layers.items()}
    if set(found) != {ImageDataLayers, TextDataLayers} or len(model.modalities) != 2:
        raise WeightsError(
            f"model.modalities={','.join(model.modalities)}: diffusers' pipelines have one modality with "
            "ImageDataLayers and one with TextDataLayers"
        )
    image, text = found[ImageDataLayers], found[TextDataLayers]
    tokens = cast(FlatLinear, cast(TextDataLayers, diffuser.data_layers[text])[0]).tokens
    if tokens != FLAT_TOKENS:
        raise WeightsError(f"model.modalities.{text}.data_layers.tokens={tokens}: diffusers has {FLAT_TOKENS}")
    return diffuser, {
        "image_unet": UnetNames(diffuser.plan, "image", image, image),
        "text_unet": UnetNames(diffuser.plan, "flat", text, text),
    }


def _check(place: str, diffuser: Diffuser, tensors: LazyTensors) -> None:
    expected, found = diffuser.state_dict(), tensors.outline()
    present = {layer_group(name) for name in expected if name in found}
    groups = dict.fromkeys(map(layer_group, expected))
    if absent := [group for group in groups if group not in present]:
        raise WeightsError(f"{place}: no layers of {', '.join(absent)}; take weights of the last stage")
    if differences := compare(expected, found):
        raise WeightsError(f"{place}: weights of another model: {differences}")


def _unet(model: ModelConfig, diffuser: Diffuser, names: UnetNames) -> Any:
    """diffusers' own U-Net of the same sizes, on the meta device: its configuration is what is wanted of it."""
    from diffusers import UNet2DConditionModel
    from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel

    config = model.diffuser
    shapes = {name: list(tensor.shape) for name, tensor in diffuser.state_dict().items()}
    flat = names.kind == "flat"
    unet, suffix = (UNetFlatConditionModel, "Flat") if flat else (UNet2DConditionModel, "2D")
    first = shapes[f"data_layers.{names.data}.0.weight"]
    latent = [first[1], 1, 1] if flat else first[1]
    attends = [level in config.attention_levels for level in range(len(config.channels))]
    with torch.device("meta"):
        return unet(
            sample_size=IMAGE_SIDE // model.latent_downsampling,
            in_channels=latent,
            out_channels=latent,
            block_out_channels=list(config.channels),
            layers_per_block=config.blocks_per_level,
            down_block_types=[f"{'CrossAttn' * attend}DownBlock{suffix}" for attend in attends],
            up_block_types=[f"{'CrossAttn' * attend}UpBlock{suffix}" for attend in reversed(attends)],
            norm_num_groups=config.norm_groups,
            norm_eps=NORM_EPSILON,
            # The number of heads, in spite of its name.
            attention_head_dim=config.heads,
            cross_attention_dim=shapes[f"context_layers.{names.context}.0.transformer_blocks.0.attn2.to_k.weight"][1],
        )


def _index() -> dict[str, Any]:
    import diffusers

    return {"_class_name": "VersatileDiffusionPipeline", "_diffusers_version": diffusers.__version__, **COMPONENTS}
