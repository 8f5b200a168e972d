"""Names of frozen weights: CLIP by open_clip and by Hugging Face, the image VAE by CompVis and by diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# CLIP, Hugging Face's names -> open_clip's.
SAME = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    **{
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in {
            "vision_model.pre_layrnorm": "visual.ln_pre",
            "vision_model.post_layernorm": "visual.ln_post",
            "text_model.final_layer_norm": "ln_final",
        }.items()
        for kind in ("weight", "bias")
    },
}
TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
LAYER_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TOWERS = {
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.encoder.layers.": "transformer.resblocks.",
}
# Constants that older versions of transformers save with the weights.
POSITION_IDS = re.compile(r"(vision|text)_model\.embeddings\.position_ids")
QUERY = "self_attn.q_proj."


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a Hugging Face CLIPModel for `open_clip.CLIP`; a foreign tensor keeps its name."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if POSITION_IDS.fullmatch(name):
            continue
        if name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = tensor.T.contiguous()
        elif QUERY in name:
            stem, _, kind = _layer_name(name, TOWERS, {}).rpartition(f".{QUERY}")
            keys = (name.replace(QUERY, f"self_attn.{part}_proj.") for part in "qkv")
            renamed[f"{stem}.attn.in_proj_{kind}"] = torch.cat([state[key] for key in keys if key in state])
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            renamed[SAME.get(name) or _layer_name(name, TOWERS, LAYER_PARTS)] = tensor
    return renamed


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `open_clip.CLIP` for a Hugging Face CLIPModel; a foreign tensor keeps its name."""
    same, transposed, towers, parts = (
        {ours: theirs for theirs, ours in table.items()} for table in (SAME, TRANSPOSED, TOWERS, LAYER_PARTS)
    )
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in transposed:
            renamed[transposed[name]] = tensor.T.contiguous()
        elif ".attn.in_proj_" in name:
            stem, _, kind = _layer_name(name, towers, {}).rpartition(".attn.in_proj_")
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{stem}.self_attn.{part}_proj.{kind}"] = chunk.clone()
        else:
            renamed[same.get(name) or _layer_name(name, towers, parts)] = tensor
    return renamed


def _layer_name(name: str, towers: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """A name inside a transformer layer under the other naming; any other name is kept."""
    for old, new in towers.items():
        if name.startswith(old):
            number, _, rest = name.removeprefix(old).partition(".")
            module, _, kind = rest.rpartition(".")
            return f"{new}{number}.{parts.get(module, module)}.{kind}"
    return name


# The image VAE, CompVis' names -> diffusers'.
VAE_PARTS = {
    "block": "resnets",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
    "nin_shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
}
ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    # diffusers before 0.13, and folders published then.
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CompVis' weights for diffusers' AutoencoderKL. A foreign tensor, or one with diffusers' name, keeps its name."""
    levels = 1 + max((int(match[1]) for key in state if (match := re.match(r"decoder\.up\.(\d+)\.", key))), default=0)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = _diffusers_name(name, levels)
        # diffusers has linear layers in place of CompVis' convolutions of one pixel.
        linear = re.search(r"attentions\.0\.to_\w+(\.0)?\.weight$", new)
        renamed[new] = tensor.flatten(1) if linear else tensor
    return renamed


def _diffusers_name(name: str, levels: int) -> str:
    def upper(match: re.Match[str]) -> str:
        # CompVis counts the decoder's levels from the image, diffusers from the latent.
        return f".up_blocks.{levels - 1 - int(match[1])}."

    def attention(match: re.Match[str]) -> str:
        return f"{match[1]}.{ATTENTION.get(match[2], match[2])}."

    name = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", re.sub(r"\.up\.(\d+)\.", upper, name))
    for old, new in VAE_PARTS.items():
        name = name.replace(f".{old}.", f".{new}.")
    return re.sub(r"(\.attentions\.0)\.(\w+)\.", attention, name)
