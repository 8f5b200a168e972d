"""CLIP's weights under open_clip's names and under those of Hugging Face's CLIPModel, both ways and bit for bit.

open_clip keeps query, key and value of an attention in one matrix, and the two projections transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Each table: Hugging Face's name -> open_clip's.
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
# Constants that files of older versions of transformers have among the weights.
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
            parts = [state.get(name.replace(QUERY, f"self_attn.{part}_proj.")) for part in "qkv"]
            whole = [part for part in parts if part is not None]
            renamed[_joined(name)] = torch.cat(whole)
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
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{stem}.self_attn.{part}_proj.{kind}"] = piece.clone()
        else:
            renamed[same.get(name) or _layer_name(name, towers, parts)] = tensor
    return renamed


def _joined(name: str) -> str:
    """open_clip's name of the matrix that holds a query projection."""
    stem, _, kind = _layer_name(name, TOWERS, {}).rpartition(f".{QUERY}")
    return f"{stem}.attn.in_proj_{kind}"


def _layer_name(name: str, towers: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """A name inside a transformer layer, in the other naming; any other name as it is."""
    for old, new in towers.items():
        if name.startswith(old):
            number, _, rest = name.removeprefix(old).partition(".")
            module, _, kind = rest.rpartition(".")
            return f"{new}{number}.{parts.get(module, module)}.{kind}"
    return name
