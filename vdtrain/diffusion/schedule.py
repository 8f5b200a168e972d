"""Noise schedule of Stable Diffusion and Versatile Diffusion, and the forward process."""

from __future__ import annotations

import torch
from torch import Tensor

from vdtrain.config.schema import ScheduleConfig


class Schedule:
    """A variance-preserving schedule whose betas are linear in their square root, computed in float64.

    Attributes:
        alphas_cumprod: [steps] float32, the share of signal variance that remains at each timestep.
    """

    def __init__(self, config: ScheduleConfig, device: torch.device | str = "cpu") -> None:
        self.steps, self.beta_start, self.beta_end = config.steps, config.beta_start, config.beta_end
        roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - roots**2, dim=0).float().to(device)

    def min_snr(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights [B] of the noise's squared error at `timesteps` [B]: min(SNR, gamma) / SNR, float32.

        Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556.
        """
        kept = self.alphas_cumprod[timesteps]
        return (gamma * (1 - kept) / kept).clamp(max=1.0)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """q(x_t | x_0): `latents` [B, ...] at `timesteps` [B] with the given unit noise, in the latents' dtype."""
        kept = self.alphas_cumprod[timesteps].view(-1, *[1] * (latents.ndim - 1))
        return (kept.sqrt() * latents.float() + (1 - kept).sqrt() * noise.float()).to(latents.dtype)
