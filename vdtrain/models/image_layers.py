"""Data layers of the image modality: the residual and sampling layers of Stable Diffusion's U-Net, without attention.

Parameter names are those of the released weights below `data_blocks.N.0.`.
"""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from vdtrain.models.layer_plan import NORM_EPSILON, DataStep, LayerPlan, Role

Layer = TypeVar("Layer", bound=nn.Module)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the timestep is added between them."""

    def __init__(self, step: DataStep, plan: LayerPlan) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(plan.norm_groups, step.width_in, eps=NORM_EPSILON),
            nn.SiLU(),
            nn.Conv2d(step.width_in, step.width_out, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(plan.embedding_width, step.width_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(plan.norm_groups, step.width_out, eps=NORM_EPSILON),
            nn.SiLU(),
            nn.Identity(),  # stands for the released layout's dropout of 0
            zero(nn.Conv2d(step.width_out, step.width_out, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if step.width_in == step.width_out else nn.Conv2d(step.width_in, step.width_out, 1)
        )

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h [B, C_in, H, W], embedding [B, E] -> [B, C_out, H, W]."""
        inner = self.in_layers(h) + self.emb_layers(embedding)[:, :, None, None]
        out: Tensor = self.skip_connection(h) + self.out_layers(inner)
        return out


class Downsample(nn.Module):
    """Halves height and width with a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.op(h)
        return out


class Upsample(nn.Module):
    """Doubles height and width with nearest-neighbour interpolation and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return out


class Enter(nn.Conv2d):
    """First layer: from the image latent to the first level's width."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(h)


class Leave(nn.Sequential):
    """Last layer: normalises and predicts the noise; starts at zero."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            h = layer(h)
        return h


class ImageDataLayers(nn.ModuleList):
    """All image data layers, in the order of the plan's data steps.

    Args:
        plan: order and widths.
        latent_channels: channels of the image latent [B, latent_channels, H, W].
    """

    def __init__(self, plan: LayerPlan, latent_channels: int) -> None:
        super().__init__(self._layer(step, plan, latent_channels) for step in plan.data_steps)

    @staticmethod
    def _layer(step: DataStep, plan: LayerPlan, latent_channels: int) -> nn.Module:
        match step.role:
            case Role.INPUT:
                return Enter(latent_channels, step.width_out, 3, padding=1)
            case Role.BLOCK:
                return ResidualBlock(step, plan)
            case Role.DOWN:
                return Downsample(step.width_out)
            case Role.UP:
                return Upsample(step.width_out)
            case Role.OUTPUT:
                return Leave(
                    nn.GroupNorm(plan.norm_groups, step.width_in, eps=NORM_EPSILON),
                    nn.SiLU(),
                    zero(nn.Conv2d(step.width_in, latent_channels, 3, padding=1)),
                )


def zero(layer: Layer) -> Layer:
    """Start a layer at zero, so that its branch adds nothing before training."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
