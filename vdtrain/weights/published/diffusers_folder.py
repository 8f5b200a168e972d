"""A whole model as a folder that diffusers' Versatile Diffusion pipelines load.

pipeline = diffusers.VersatileDiffusionPipeline.from_pretrained(folder)

The published folder shi-labs/versatile-diffusion has the same layout. A diffusers pipeline only makes images, so the
text VAE is not part of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from vdtrain.config.instantiate import instantiate
from vdtrain.config.schema import ModelConfig, ScheduleConfig
from vdtrain.files import refuse_existing, write_text, written_whole
from vdtrain.models.clip import ClipImageContext, ClipTextContext
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.frozen_weights import WeightsError, compare, load_tokenizer
from vdtrain.models.image_vae import ImageVAE
from vdtrain.models.layer_plan import NORM_EPSILON
from vdtrain.models.tokenizers import released_tokenizer
from vdtrain.progress import track
from vdtrain.weights.folder import CARD_FILE, PIPELINE_FILE, is_export, write_shards
from vdtrain.weights.published.diffusers_names import IMAGE_SIDE, MODEL_STEM, UnetNames, check_whole, unets
from vdtrain.weights.published.frozen_names import to_hugging_face
from vdtrain.weights.tensor_files import LazyTensors

FLAT_UNET_MODULE = "diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet"
"""The module of the text U-Net's class. The published folder names "versatile_diffusion", which no longer exists."""
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
ACTIVATIONS: dict[type[nn.Module], str] = {open_clip.transformer.QuickGELU: "quick_gelu", nn.GELU: "gelu"}
CLIP_PARTS = {"text_model", "text_projection", "vision_model", "visual_projection", "logit_scale"}
"""First words of the names of CLIP's tensors at Hugging Face."""


def write_pipeline(
    folder: Path,
    tensors: Mapping[str, Tensor],
    model: ModelConfig,
    setting: str = "folder",
    overwrite: bool = False,
    card: str | None = None,
) -> None:
    """Write the diffuser and the configured frozen parts. The folder appears when it is whole.

    Args:
        tensors: the whole diffuser by our names. Each tensor is read when it is written, and keeps its dtype. The
            frozen parts are written in the dtype of the global layers.
        setting: names where the folder comes from, in errors.
        overwrite: replace what exists.
        card: text of a model card.

    Raises:
        ConfigError: the folder exists already, or cannot be written.
        WeightsError: layers are missing, or diffusers cannot run one of the model's parts.
    """
    place = f"{setting}={folder}"
    refuse_existing(folder, place, overwrite, ours=is_export)
    diffuser, names_by_unet = unets(model)
    tensors = LazyTensors.of(tensors)
    check_whole(tensors, model, place)
    dtype = tensors.entries["global_layers.0.weight"].dtype
    image, text = (names.data for names in names_by_unet.values())
    with written_whole(folder, place, overwrite, is_export) as draft:
        for part, names in names_by_unet.items():
            (draft / part).mkdir(parents=True)
            meta_unet(model, diffuser, names).save_config(draft / part)
            keys = {key: name for name in tensors if (key := names.to_diffusers(name))}
            write_shards(draft / part, MODEL_STEM, track(tensors.renamed(keys).items(), f"writing {part}", "tensors"))
        write_vae(draft / "vae", model, image, dtype)
        write_text_encoder(draft / "text_encoder", draft / "tokenizer", model, text, dtype)
        write_image_encoder(draft / "image_encoder", draft / "image_feature_extractor", model, image, dtype)
        write_scheduler(draft / "scheduler", model.schedule)
        index = {"_class_name": "VersatileDiffusionPipeline", "_diffusers_version": version("diffusers"), **COMPONENTS}
        (draft / PIPELINE_FILE).write_text(json.dumps(index, indent=2))
        if card is not None:
            write_text(draft / CARD_FILE, card)


def meta_unet(model: ModelConfig, diffuser: Diffuser, names: UnetNames) -> Any:
    """diffusers' own U-Net of the same sizes, on the meta device, for its configuration."""
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
            # The number of heads, despite the name.
            attention_head_dim=config.heads,
            cross_attention_dim=shapes[f"context_layers.{names.context}.0.transformer_blocks.0.attn2.to_k.weight"][1],
        )


def write_vae(folder: Path, model: ModelConfig, image: str, dtype: torch.dtype) -> None:
    """Write `AutoencoderKL` of the modality `image`."""
    vae = _built(model, image, "vae", ImageVAE)
    autoencoder: Any = vae.autoencoder
    autoencoder.register_to_config(scaling_factor=vae.latent_scale, sample_size=IMAGE_SIDE)
    folder.mkdir()
    autoencoder.save_config(folder)
    write_shards(folder, MODEL_STEM, ((name, tensor.to(dtype)) for name, tensor in autoencoder.state_dict().items()))


def write_text_encoder(folder: Path, tokenizer_folder: Path, model: ModelConfig, text: str, dtype: torch.dtype) -> None:
    """Write `CLIPTextModelWithProjection` and `CLIPTokenizer` of the modality `text`."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    context = _built(model, text, "context_encoder", ClipTextContext)
    clip = context.clip
    size = context.tokenizer.size
    config = CLIPTextConfig(
        **_transformer_sizes(clip.transformer),
        vocab_size=clip.vocab_size,
        max_position_embeddings=clip.context_length,
        layer_norm_eps=clip.ln_final.eps,
        projection_dim=clip.text_projection.shape[1],
        # CLIP pools the first token with this id, and the tokenizer pads with it.
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    _write_encoder(folder, CLIPTextModelWithProjection, config, clip, dtype)
    path = model.modalities[text].context_encoder.get("tokenizer")
    _write_tokenizer(tokenizer_folder, path, f"model.modalities.{text}.context_encoder.tokenizer", clip.context_length)


def write_image_encoder(
    folder: Path, processor_folder: Path, model: ModelConfig, image: str, dtype: torch.dtype
) -> None:
    """Write `CLIPVisionModelWithProjection` and `CLIPImageProcessor` of the modality `image`."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    context = _built(model, image, "context_encoder", ClipImageContext)
    visual: Any = context.clip.visual
    config = CLIPVisionConfig(
        **_transformer_sizes(visual.transformer),
        image_size=context.side,
        patch_size=visual.patch_size[0],
        layer_norm_eps=visual.ln_post.eps,
        projection_dim=visual.proj.shape[1],
    )
    _write_encoder(folder, CLIPVisionModelWithProjection, config, context.clip, dtype)
    CLIPImageProcessor(
        size={"shortest_edge": context.side}, crop_size={"height": context.side, "width": context.side}
    ).save_pretrained(processor_folder)


def write_scheduler(folder: Path, schedule: ScheduleConfig) -> None:
    """Write `DDIMScheduler` with the original's timesteps: offset by 1, and the last ends at alphas_cumprod[0]."""
    from diffusers import DDIMScheduler

    # diffusers' constructors are not typed.
    scheduler: Any = DDIMScheduler
    scheduler(
        num_train_timesteps=schedule.steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder)


def _built(model: ModelConfig, modality: str, part: str, kind: type[Any]) -> Any:
    setting = f"model.modalities.{modality}.{part}"
    built = instantiate(getattr(model.modalities[modality], part), setting)
    if not isinstance(built, kind):
        raise WeightsError(
            f"{setting}._target_={type(built).__name__}: diffusers has only a counterpart of {kind.__name__}"
        )
    return built


def _transformer_sizes(transformer: open_clip.transformer.Transformer) -> dict[str, Any]:
    """Hugging Face's configuration of an open_clip transformer."""
    block: Any = transformer.resblocks[0]
    if type(block.mlp.gelu) not in ACTIVATIONS:
        raise WeightsError(f"context_encoder.architecture: {block.mlp.gelu} has no counterpart in Hugging Face's CLIP")
    return {
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": ACTIVATIONS[type(block.mlp.gelu)],
    }


def _write_encoder(
    folder: Path, kind: Callable[[Any], nn.Module], config: Any, clip: nn.Module, dtype: torch.dtype
) -> None:
    """Write one of CLIP's encoders: its tensors of the whole CLIP, under Hugging Face's names."""
    with torch.device("meta"):
        expected = kind(config).state_dict()
    others = CLIP_PARTS - {name.partition(".")[0] for name in expected}
    found: dict[str, Tensor] = {
        name: tensor.to(dtype)
        for name, tensor in to_hugging_face(clip.state_dict()).items()
        if name.partition(".")[0] not in others
    }
    if differences := compare(expected, found):
        raise WeightsError(
            f"context_encoder.architecture: not a CLIP that Hugging Face's classes can run: {differences}"
        )
    folder.mkdir()
    config.architectures = [getattr(kind, "__name__", "")]
    config.save_pretrained(folder)
    write_shards(folder, "model", found.items())


def _write_tokenizer(folder: Path, path: str | None, setting: str, length: int) -> None:
    tokenizer = released_tokenizer() if path is None else load_tokenizer(path, setting)
    content = json.loads(tokenizer.to_str())["model"]
    start, end = (tokenizer.id_to_token(tokenizer.get_vocab_size() - back) for back in (2, 1))
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [" ".join(pair) for pair in content["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}, indent=2)
    )
