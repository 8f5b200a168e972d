"""Images to latents and back: the frozen KL autoencoder of latent diffusion.

Rombach et al. 2022, section 3.1 and appendix G (model kl-f8); Versatile Diffusion uses it unchanged (section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from vdtrain.models.frozen_weights import device_and_dtype, load_weights

CHANNELS = 3


class ImageVAE(nn.Module):
    """diffusers' AutoencoderKL with uint8 images outside and scaled latents inside.

    Args:
        block_out_channels: width of each level; every level after the first halves the image.
        layers_per_block: residual blocks of a level in the encoder; the decoder has one more.
        latent_channels: channels of a latent.
        norm_num_groups: groups of the group normalisations; divides every width.
        latent_scale: factor from the autoencoder's latents to the diffuser's, whose standard deviation is about 1.
        weights: safetensors file with diffusers' key names; None leaves random weights.
    """

    def __init__(
        self,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        latent_channels: int,
        norm_num_groups: int,
        latent_scale: float = 0.18215,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if any(width % norm_num_groups for width in block_out_channels):
            raise ValueError(
                f"norm_num_groups={norm_num_groups} does not divide block_out_channels={list(block_out_channels)}"
            )
        levels = len(block_out_channels)
        self.latent_channels = latent_channels
        self.latent_scale = latent_scale
        self.downsampling = 2 ** (levels - 1)
        # diffusers' constructors and methods have no types.
        autoencoder: Any = AutoencoderKL
        self.model = autoencoder(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
        )
        if weights is not None:
            load_weights(self.autoencoder, weights, "vae.weights")

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one latent, [channels, H/f, W/f], for images of `size` (H, W) in pixels.

        Raises:
            ValueError: a side is not a multiple of the downsampling factor f.
        """
        if any(side % self.downsampling for side in size):
            raise ValueError(f"size={size}: must be multiples of {self.downsampling}, the image VAE's downsampling")
        height, width = (side // self.downsampling for side in size)
        return self.latent_channels, height, width

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images.

        Args:
            images: uint8 [B, 3, H, W]; H and W are multiples of the downsampling factor f.
            noise: standard normal [B, channels, H/f, W/f]. The latent is then a sample of the posterior,
                mean + std * noise, as in latent diffusion's training. None gives the mean.

        Returns:
            Latents [B, channels, H/f, W/f] in the dtype of the parameters, multiplied by `latent_scale`.
        """
        return self.from_moments(self.moments(images), noise)

    def moments(self, images: Tensor) -> Tensor:
        """Means and log variances of images uint8 [B, 3, H, W]; `encode` needs nothing else of an image.

        Returns:
            [B, 2 * channels, H/f, W/f] in the dtype of the parameters, unscaled and not clamped.
        """
        device, dtype = device_and_dtype(self)
        return self._distribution(to_signed(images.to(device), dtype)).parameters

    def from_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """The latents that `encode` returns, from moments on any device and in any precision."""
        # The distribution clamps the log variance to -30..20.
        distribution = DiagonalGaussianDistribution(moments.to(*device_and_dtype(self)))
        mean: Tensor = distribution.mean
        latents = mean if noise is None else mean + distribution.std * noise.to(mean)
        return latents * self.latent_scale

    @torch.no_grad()
    def decode(self, latents: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Decode latents [B, channels, h, w] of `encode` into images, uint8 [B, 3, h*f, w*f].

        The decoder draws no random numbers; `generators` belongs to the interface that all VAEs share.
        """
        device, dtype = device_and_dtype(self)
        pixels = self.reconstruct(latents.to(device, dtype) / self.latent_scale)
        return pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

    def blocks(self) -> list[nn.Module]:
        """The encoder, for compilation."""
        return [self.model.encoder]

    @property
    def autoencoder(self) -> nn.Module:
        """The diffusers module; weights files have its key names."""
        model: nn.Module = self.model
        return model

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, unscaled, each [B, channels, H/f, W/f], for pixels [B, 3, H, W] in -1..1."""
        distribution = self._distribution(pixels)
        return distribution.mean, distribution.std

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, h*f, w*f], about -1..1 and not clamped, from unscaled latents [B, channels, h, w]."""
        pixels: Tensor = self.model.decode(latents).sample
        return pixels

    def _distribution(self, pixels: Tensor) -> DiagonalGaussianDistribution:
        distribution: DiagonalGaussianDistribution = self.model.encode(pixels).latent_dist
        return distribution


def to_signed(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Map uint8 images to -1..1."""
    return images.to(dtype).div(127.5).sub(1)
