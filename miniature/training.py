"""Training of the tiny frozen parts, one function each. None of them is needed to train the diffuser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from miniature.corpus import caption_facts, draw_images, sample_scenes, scene_facts, write_captions
from vdtrain.models.clip import ClipImageContext, ClipTextContext
from vdtrain.models.image_vae import ImageVAE, to_signed
from vdtrain.models.optimus import Optimus
from vdtrain.progress import Progress

WARMUP_STEPS = 100
REPORT_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """How one part is trained."""

    steps: int
    batch: int
    learning_rate: float


def fit(model: nn.Module, recipe: Recipe, losses: Callable[[int], dict[str, Tensor]], progress: Progress) -> None:
    """Minimise the sum of `losses(step)` with AdamW; the learning rate warms up and falls to 0 along a cosine."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    for step in range(recipe.steps):
        factor = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * factor
        parts = losses(step)
        optimizer.zero_grad()
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == recipe.steps:
            progress.note = "  ".join(f"{name} {value.item():.4f}" for name, value in parts.items())
        progress.advance()
    model.eval().requires_grad_(False)


TEXT_DIVERGENCE_WEIGHT = 0.05
TEXT_FREE_NATS = 1.0
TEXT_NOISE_STEPS = 1000


def train_text_vae(vae: Optimus, recipe: Recipe, seed: int, progress: Progress) -> None:
    """Train Optimus to repeat captions; its latents come out with a deviation of 1 over the captions.

    The posterior's noise grows from none over the first steps: at full strength from the start, the decoder learns to
    do without the latent. Ends with `standardise_text`.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(20_000, rng)

    def losses(step: int) -> dict[str, Tensor]:
        captions = write_captions([scenes[i] for i in rng.integers(len(scenes), size=recipe.batch)], rng)
        noise = torch.randn((recipe.batch, vae.latent_size), generator=generator) * min(1.0, step / TEXT_NOISE_STEPS)
        loss = vae.loss(captions, noise, TEXT_DIVERGENCE_WEIGHT, "mask", TEXT_FREE_NATS)
        return {"loss": loss.total.mean()}

    fit(vae, recipe, losses, progress)
    standardise_text(vae, write_captions(scenes[:5_000], rng))


@torch.no_grad()
def standardise_text(vae: Optimus, captions: Sequence[str]) -> None:
    """Rescale the latent inside Optimus so that every dimension of the mean has a root mean square of 1.

    The map is absorbed into the matrices around the latent, which have no bias: captions decode as before. The
    posterior's variance keeps its old scale: nothing reads it after training.
    """
    scale = vae.encode(captions).square().mean(dim=0).sqrt()
    vae.get_parameter("encoder.linear.weight")[: vae.latent_size] /= scale[:, None]
    for name in ("linear", "linear_emb"):
        vae.get_parameter(f"decoder.transformer.{name}.weight").mul_(scale)


def train_clip(image: ClipImageContext, text: ClipTextContext, recipe: Recipe, seed: int, progress: Progress) -> None:
    """Train the CLIP that both context encoders share (Radford et al. 2021, section 2.3).

    Captions leave most of a scene open, so that many of them are true of several images in a batch: a caption that
    is true of another image is no negative for it.
    """
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(8_000, rng)
    facts = scene_facts(scenes)
    images = [draw_images(scenes, pixels, rng) for pixels in RESOLUTIONS]
    targets = torch.arange(recipe.batch)
    clip = image.clip

    def losses(step: int) -> dict[str, Tensor]:
        chosen = rng.choice(len(scenes), size=recipe.batch, replace=False)
        captions = write_captions([scenes[i] for i in chosen], rng)
        stated = caption_facts(captions)
        true = ((facts[chosen][:, None] == stated) | (stated < 0)).all(dim=-1)
        false_negative = true & ~torch.eye(recipe.batch, dtype=torch.bool)
        ids = text.tokenizer(captions)
        read = text.encode_ids(ids)[targets, ids.argmax(dim=-1)]
        seen = image.encode(images[step % len(images)][chosen])
        scale = clip.logit_scale.exp().clamp(max=100.0)

        def contrastive(features: Tensor) -> Tensor:
            scores = (scale * features @ read.T).masked_fill(false_negative, float("-inf"))
            return (functional.cross_entropy(scores, targets) + functional.cross_entropy(scores.T, targets)) / 2

        # The mean, so that patches tell of the image too: nothing else trains the last layer's patch tokens.
        mean = functional.normalize(seen.mean(dim=1), dim=-1)
        return {"contrastive": contrastive(seen[:, 0]), "mean_contrastive": contrastive(mean)}

    fit(clip, recipe, losses, progress)


RESOLUTIONS = (32, 64)
IMAGE_BATCHES = {32: 16, 64: 12}
IMAGE_DIVERGENCE_WEIGHT = 0.02
IMAGE_NOISE = 0.2
"""Standard deviation, in units of the latents' own, of the largest noise that the decoder is made to look through."""


def train_image_vae(vae: ImageVAE, recipe: Recipe, seed: int, progress: Progress) -> None:
    """Train the image VAE on small images first and on both sizes in the second half, which costs most of the time.

    Beside the loss of Rombach et al. 2022, appendix G (without its adversarial and perceptual parts, which drawn
    shapes do not need), the decoder sees latents with more noise than the posterior's, as a diffuser will give it.
    Ends with `standardise_images`.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    images = {pixels: draw_images(sample_scenes(8_000, rng), pixels, rng) for pixels in RESOLUTIONS}

    def losses(step: int) -> dict[str, Tensor]:
        second_half = 2 * step > recipe.steps
        pixels = RESOLUTIONS[1] if second_half and step % 3 == 0 else RESOLUTIONS[0]
        chosen = torch.from_numpy(rng.integers(len(images[pixels]), size=IMAGE_BATCHES[pixels]))
        target = to_signed(images[pixels][chosen], torch.float32)
        mean, std = vae.posterior(target)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        strength = IMAGE_NOISE * latents.detach().std() * torch.rand((len(latents), 1, 1, 1), generator=generator)
        found = vae.reconstruct(latents + strength * torch.randn(mean.shape, generator=generator))
        divergence = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum() / target.numel()
        warmup = min(1.0, 2 * step / recipe.steps)
        return {
            "absolute": (found - target).abs().mean(),
            "squared": (found - target).square().mean(),
            "divergence": IMAGE_DIVERGENCE_WEIGHT * warmup * divergence,
        }

    fit(vae, recipe, losses, progress)
    standardise_images(vae, to_signed(images[RESOLUTIONS[1]][:512], torch.float32))


@torch.no_grad()
def standardise_images(vae: ImageVAE, pixels: Tensor) -> None:
    """Rescale the latents inside the VAE so that every channel, times `latent_scale`, has mean 0 and deviation 1.

    The map is absorbed into the two 1 x 1 convolutions around the latent: images decode as before.
    """
    mean, std = vae.posterior(pixels)
    centre = mean.mean(dim=(0, 2, 3))
    spread = ((mean - centre[:, None, None]).square() + std.square()).mean(dim=(0, 2, 3)).sqrt()
    factor = 1 / (spread * vae.latent_scale)
    encoder, decoder, channels = vae.model.quant_conv, vae.model.post_quant_conv, len(centre)
    encoder.weight[:channels] *= factor[:, None, None, None]
    encoder.bias[:channels] = (encoder.bias[:channels] - centre) * factor
    # The other half of the channels is the logarithm of the variance.
    encoder.bias[channels:] += 2 * factor.log()
    decoder.bias += decoder.weight[:, :, 0, 0] @ centre
    decoder.weight /= factor[:, None, None]
