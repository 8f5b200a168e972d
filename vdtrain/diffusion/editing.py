"""Latent image-to-text-to-image editing: words change an image's text latent, which generates a new image.

Versatile Diffusion, section 4.5, with the steps of the authors' script of November 2022:
1. Image-to-text gives a text latent of the image.
2. The latent loses its component along the removed words' latent, and the added words' latent is added to it.
3. The text VAE decodes a caption from it. This caption, the added words and the old image's style generate the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vdtrain.diffusion.arguments import seeds_of
from vdtrain.diffusion.contexts import joined, low_rank, make_mixing
from vdtrain.diffusion.sampling import Progress
from vdtrain.errors import ConfigError
from vdtrain.models.diffuser import Context

if TYPE_CHECKING:
    from vdtrain.pipeline import VersatileDiffusion

IMAGE, TEXT = "image", "text"
# That it samples with.
FLOWS = ("image-to-text", "image-to-image", "text-to-image")


def edit(
    model: VersatileDiffusion,
    images: Tensor,
    remove: str = "",
    add: str = "",
    *,
    text_share: float = 0.67,
    style_rank: int = 10,
    seeds: Sequence[int] | None = None,
    progress: Progress = list,
    decode: bool = True,
    **settings: Any,
) -> tuple[Tensor, list[str]]:
    """Edit images by words.

    Args:
        images: uint8 [B, 3, h, w].
        remove: words to remove; "" removes nothing.
        add: words to add; "" adds nothing.
        text_share: weight of the text in the new image; the old image's style has the rest.
        style_rank: leading components of the old image's context that count as its style.
        seeds, decode: see `VersatileDiffusion.sample`.
        settings: fields of `SamplingConfig`.

    Returns:
        The new images, uint8 [B, 3, H, W], and the captions of the changed latents.

    Raises:
        ConfigError: the model lacks a needed flow, or a setting is invalid.
    """
    if not remove and not add:
        raise ConfigError("remove, add: both are empty; give at least one")
    if not 0 < text_share < 1 or style_rank < 1:
        raise ConfigError(f"text_share={text_share}, style_rank={style_rank}: must be between 0 and 1, at least 1")
    for name in FLOWS:
        model.flow(name)
    chosen = model.settings(settings)
    tokens = model.encode_context(IMAGE, images, chosen.batch_size)
    seeds = seeds_of(None, chosen.seed, len(images)) if seeds is None else seeds
    latents = model.sample(TEXT, [Context(IMAGE, tokens)], chosen, progress=progress, seeds=seeds, decode=False)
    captions = model.decode(TEXT, changed(model, latents, remove, add), seeds)
    texts = [Context(TEXT, model.encode_context(TEXT, captions, chosen.batch_size))]
    if add:
        texts.append(Context(TEXT, model.encode_context(TEXT, [add]).expand(len(captions), -1, -1)))
    text = joined(texts, [1.0] * len(texts))
    style = Context(IMAGE, low_rank(tokens[:, 1:], style_rank))
    edited = model.sample(
        IMAGE,
        [text, style],
        chosen,
        unconditional=[
            Context(TEXT, model.unconditional(IMAGE, TEXT).repeat(1, len(texts), 1)),
            Context(IMAGE, model.unconditional(IMAGE, IMAGE)[:, 1:]),
        ],
        mixing=make_mixing("attention", [text_share, 1 - text_share], len(model.diffuser.plan.context_steps), 0),
        progress=progress,
        seeds=seeds,
        decode=decode,
    )
    return edited, captions


def changed(model: VersatileDiffusion, latents: Tensor, remove: str, add: str) -> Tensor:
    """Text latents [B, D] minus their component along the latent of `remove`, plus the latent of `add`."""
    if remove:
        (direction,) = model.encode_latents(TEXT, [remove]).float()
        direction = direction / direction.norm()
        latents = latents - (latents @ direction)[:, None] * direction
    if add:
        latents = latents + model.encode_latents(TEXT, [add]).float()
    return latents
