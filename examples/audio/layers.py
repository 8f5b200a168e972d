"""Data layers for latents along time, such as those of sounds: convolutions in one dimension."""

from __future__ import annotations

from torch import Tensor, nn

from vdtrain.models.image_layers import zero
from vdtrain.models.layer_plan import DataStep, LayerPlan, Role


class Convolution(nn.Conv1d):
    """A convolution along time, from a latent [B, C, L] or a state [B, C, L, 1] to a state [B, C', L', 1]."""

    def forward(self, h: Tensor, embedding: Tensor | None = None) -> Tensor:
        return super().forward(h.flatten(2)).unsqueeze(3)


class Upsample(Convolution):
    """Doubles the length."""

    def forward(self, h: Tensor, embedding: Tensor | None = None) -> Tensor:
        return super().forward(h.repeat_interleave(2, dim=2))


class Block(nn.Module):
    """Two convolutions with the timestep added between them, around a shortcut."""

    def __init__(self, step: DataStep, plan: LayerPlan) -> None:
        super().__init__()
        width = step.width_out
        self.first = nn.Sequential(
            nn.GroupNorm(plan.norm_groups, step.width_in), nn.SiLU(), Convolution(step.width_in, width, 3, padding=1)
        )
        self.time = nn.Linear(plan.embedding_width, width)
        self.second = nn.Sequential(
            nn.GroupNorm(plan.norm_groups, width), nn.SiLU(), zero(Convolution(width, width, 3, padding=1))
        )
        self.shortcut = nn.Identity() if step.width_in == width else Convolution(step.width_in, width, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        inner = self.first(h) + self.time(embedding)[:, :, None, None]
        out: Tensor = self.shortcut(h) + self.second(inner)
        return out


class Leave(nn.Sequential):
    """A state [B, C, L, 1] to noise in the latent [B, C, L]."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            h = layer(h)
        return h.squeeze(3)


class SoundDataLayers(nn.ModuleList):
    """All data layers, in the order of the plan's data steps; states are [B, C, L, 1].

    Args:
        channels: C of the latents [B, C, L].
    """

    def __init__(self, plan: LayerPlan, channels: int = 16) -> None:
        super().__init__(self._layer(step, plan, channels) for step in plan.data_steps)

    @staticmethod
    def _layer(step: DataStep, plan: LayerPlan, channels: int) -> nn.Module:
        match step.role:
            case Role.INPUT:
                return Convolution(channels, step.width_out, 3, padding=1)
            case Role.BLOCK:
                return Block(step, plan)
            case Role.DOWN:
                return Convolution(step.width_in, step.width_out, 3, stride=2, padding=1)
            case Role.UP:
                return Upsample(step.width_in, step.width_out, 3, padding=1)
            case Role.OUTPUT:
                last = zero(Convolution(step.width_in, channels, 3, padding=1))
                return Leave(nn.GroupNorm(plan.norm_groups, step.width_in), nn.SiLU(), last)
