"""Multi-head attention over tokens, with the kernel chosen by configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's fused attention on [B, heads, L, D]."""
    return F.scaled_dot_product_attention(query, key, value)


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """xformers' memory-efficient attention on [B, heads, L, D]; GPUs only."""
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
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
        """tokens [B, L, width], context [B, M, context_width] -> [B, L, width]. No mask: padding is attended to."""
        batch, length, width = tokens.shape
        query, key, value = (
            part.view(batch, -1, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        out: Tensor = self.to_out(self.kernel(query, key, value).transpose(1, 2).reshape(batch, length, width))
        return out


def use_kernel(module: nn.Module, name: str) -> None:
    """Set the attention kernel ("sdpa" or "xformers") of every attention layer below `module`."""
    for layer in module.modules():
        if isinstance(layer, Attention):
            layer.kernel = KERNELS[name]
