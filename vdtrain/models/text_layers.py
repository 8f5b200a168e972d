"""Data layers of the text modality: fully connected counterparts of the image layers ("FCResBlocks" in the paper).

A text latent has no spatial extent. The state between the layers is [B, C, S, 1]: S tokens of width C. Context layers
attend over the tokens. Data layers see the C x S values as one flat vector, channel by channel.
Parameter names and shapes are those of the released weights below `data_blocks.N.0.` (pointwise weights are 4-D).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vdtrain.models.image_layers import zero
from vdtrain.models.layer_plan import NORM_EPSILON, DataStep, LayerPlan, Role


class PointwiseLinear(nn.Conv2d):
    """A linear layer on [B, width_in], with the 4-D weight of the released layout."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, 1)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight.flatten(1), self.bias)


class FullyConnectedBlock(nn.Module):
    """Two linear layers beside a shortcut; the timestep is added between them."""

    def __init__(self, step: DataStep, plan: LayerPlan, tokens: int) -> None:
        super().__init__()
        width_in, width_out = step.width_in * tokens, step.width_out * tokens
        self.width_out, self.tokens = step.width_out, tokens
        self.in_layers = nn.Sequential(
            nn.GroupNorm(plan.norm_groups, width_in, eps=NORM_EPSILON),
            nn.SiLU(),
            PointwiseLinear(width_in, width_out),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(plan.embedding_width, width_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(plan.norm_groups, width_out, eps=NORM_EPSILON),
            nn.SiLU(),
            nn.Identity(),  # stands for the released layout's dropout of 0
            zero(PointwiseLinear(width_out, width_out)),
        )
        self.skip_connection = nn.Identity() if width_in == width_out else PointwiseLinear(width_in, width_out)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h [B, C_in, S, 1], embedding [B, E] -> [B, C_out, S, 1]."""
        flat = h.flatten(1)
        inner = self.in_layers(flat) + self.emb_layers(embedding)
        out: Tensor = self.skip_connection(flat) + self.out_layers(inner)
        return out.view(-1, self.width_out, self.tokens, 1)


class FlatLinear(nn.Linear):
    """A linear layer on the flat state: the first layer, and the one where image layers change resolution."""

    def __init__(self, width_in: int, width_out: int, tokens: int) -> None:
        super().__init__(width_in, width_out * tokens)
        self.tokens = tokens

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        out = super().forward(h.flatten(1))
        return out.view(out.shape[0], -1, self.tokens, 1)


class Leave(nn.Sequential):
    """Last layer: normalises and predicts the noise; starts at zero."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        norm, activation, linear = self
        out: Tensor = linear(activation(norm(h)).flatten(1))
        return out


class TextDataLayers(nn.ModuleList):
    """All text data layers, in the order of the plan's data steps.

    Args:
        plan: order and widths.
        latent_width: width of the text latent [B, latent_width].
        tokens: S, the number of tokens that the context layers see.
    """

    def __init__(self, plan: LayerPlan, latent_width: int, tokens: int) -> None:
        super().__init__(self._layer(step, plan, latent_width, tokens) for step in plan.data_steps)

    @staticmethod
    def _layer(step: DataStep, plan: LayerPlan, latent_width: int, tokens: int) -> nn.Module:
        match step.role:
            case Role.INPUT:
                return FlatLinear(latent_width, step.width_out, tokens)
            case Role.BLOCK:
                return FullyConnectedBlock(step, plan, tokens)
            case Role.DOWN | Role.UP:
                return FlatLinear(step.width_in * tokens, step.width_out, tokens)
            case Role.OUTPUT:
                return Leave(
                    nn.GroupNorm(plan.norm_groups, step.width_in, eps=NORM_EPSILON),
                    nn.SiLU(),
                    zero(nn.Linear(step.width_in * tokens, latent_width)),
                )
