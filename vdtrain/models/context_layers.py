"""Context layers: transformer blocks whose cross-attention reads the context, of one kind for all modalities.

The n-th layer serves the n-th context position of every output modality. It therefore sees image states [B, C, H, W]
and text states [B, C, S, 1] alike. Names are those of the released weights below `context_blocks.N.0.`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdtrain.models.image_layers import zero
from vdtrain.models.layer_plan import LayerPlan

NORM_EPSILON = 1e-6  # of the group norm here, unlike the data layers' 1e-5

# (queries, keys, values, scale of their products) -> the values that each query reads; all [B, heads, L, D]
AttentionKernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """PyTorch's fused attention on [B, heads, L, D]."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def xformers(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """xformers' memory-efficient attention on [B, heads, L, D]; GPUs only."""
    from xformers.ops import memory_efficient_attention

    rows = (part.transpose(1, 2) for part in (query, key, value))
    out: Tensor = memory_efficient_attention(*rows, scale=scale)
    return out.transpose(1, 2)


KERNELS: dict[str, AttentionKernel] = {"sdpa": sdpa, "xformers": xformers}


class Attention(nn.Module):
    """Queries from `width`, keys and values from `context_width`; names as in the released weights."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kernel: AttentionKernel = sdpa
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """tokens [B, L, width], context [B, M, context_width] -> [B, L, width]. No mask: queries attend to padding."""
        batch, length, width = tokens.shape
        size = width // self.heads
        heads = (batch, -1, self.heads, size)
        query = self.to_q(tokens).view(heads)
        if reads_tokens(length, width, self.heads, *context.shape[1:]):
            read = self._read_tokens(query, context)
        else:
            keys, values = (layer(context).view(heads).transpose(1, 2) for layer in (self.to_k, self.to_v))
            read = self.kernel(query.transpose(1, 2), keys, values, size**-0.5).transpose(1, 2)
        out: Tensor = self.to_out(read.reshape(batch, length, width))
        return out

    def _read_tokens(self, query: Tensor, context: Tensor) -> Tensor:
        """Attention of queries [B, L, heads, d] without keys and values: [B, L, heads, d].

        A query times a key, W k, equals the query times W, times the context token k. A weighted mean of values equals
        the value of the weighted mean of tokens. So the queries of all heads can attend to the tokens themselves.
        """
        batch, length, heads, size = query.shape
        keys, values = (layer.weight.view(heads, size, -1) for layer in (self.to_k, self.to_v))
        asked = torch.einsum("blhd,hdc->bhlc", query, keys).flatten(1, 2)
        # No fused kernel suits queries as wide as a token: on an H200, attention took 46 ms of a step with one.
        # It takes 27 ms without. Plain products also leave out the gradient of the frozen context. The logits are
        # in float32, as fused kernels have them.
        logits = asked.float() @ context.float().transpose(1, 2)
        weights = torch.softmax(logits * size**-0.5, dim=-1).to(context.dtype)
        return torch.einsum("bhlc,hdc->blhd", (weights @ context).view(batch, heads, length, -1), values)


def reads_tokens(length: int, width: int, heads: int, context_length: int, context_width: int) -> bool:
    """Whether queries should attend to the context tokens themselves: it takes at most half the multiplications.

    It does where queries are few: a text latent has 4 tokens, and reads up to 257.
    """
    by_tokens = length * context_width * (width + heads * context_length)
    by_keys = context_length * width * (context_width + length)
    return 2 * by_tokens <= by_keys


def use_kernel(module: nn.Module, name: str) -> None:
    """Set the attention kernel ("sdpa" or "xformers") of every attention layer below `module`."""
    for layer in module.modules():
        if isinstance(layer, Attention):
            layer.kernel = KERNELS[name]


class GatedGelu(nn.Module):
    """A linear layer to twice the hidden width; one half gates the other."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    """A gated GELU layer of four times the width, and a linear layer back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GatedGelu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.net(tokens)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each behind a layer norm."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, context_width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, normed)
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        out: Tensor = tokens + self.ff(self.norm3(tokens))
        return out


class ContextLayer(nn.Module):
    """One context position: group norm, into tokens, a transformer block, back, added to the input."""

    def __init__(self, width: int, context_width: int, plan: LayerPlan) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(plan.norm_groups, width, eps=NORM_EPSILON)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context_width, plan.heads)])
        self.proj_out = zero(nn.Conv2d(width, width, 1))

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """h [B, C, H, W], context [B, M, context_width] -> [B, C, H, W]."""
        # The 1x1 convolutions are linear layers on tokens; in this form they need no second transposition.
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        tokens = F.linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return h + tokens.transpose(1, 2).reshape_as(h)


class ContextLayers(nn.ModuleList):
    """All context layers of one modality, in the order of the plan's context steps.

    Args:
        plan: order and widths.
        context_width: width of the context tokens [B, M, context_width].
    """

    def __init__(self, plan: LayerPlan, context_width: int) -> None:
        super().__init__(ContextLayer(step.width, context_width, plan) for step in plan.context_steps)
