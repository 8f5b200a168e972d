"""The image VAE's weights under CompVis' names (kl-f8) and under those of diffusers' AutoencoderKL."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

PARTS = {
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
    # diffusers before 0.13, and the folders published then.
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CompVis' weights for diffusers' AutoencoderKL; what has diffusers' name already, or is foreign, keeps it."""
    levels = 1 + max((int(match[1]) for key in state if (match := re.match(r"decoder\.up\.(\d+)\.", key))), default=0)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = _diffusers_name(name, levels)
        # diffusers has linear layers where CompVis has convolutions of one pixel.
        linear = re.search(r"attentions\.0\.to_\w+(\.0)?\.weight$", new)
        renamed[new] = tensor.flatten(1) if linear else tensor
    return renamed


def _diffusers_name(name: str, levels: int) -> str:
    def upper(match: re.Match[str]) -> str:
        # CompVis counts the decoder's levels from the picture, diffusers from the latent.
        return f".up_blocks.{levels - 1 - int(match[1])}."

    def attention(match: re.Match[str]) -> str:
        return f"{match[1]}.{ATTENTION.get(match[2], match[2])}."

    name = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", re.sub(r"\.up\.(\d+)\.", upper, name))
    for old, new in PARTS.items():
        name = name.replace(f".{old}.", f".{new}.")
    return re.sub(r"(\.attentions\.0)\.(\w+)\.", attention, name)
