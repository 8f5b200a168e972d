"""Latent image-to-text-to-image editing: an image's text latent, changed by words, and drawn again.

Versatile Diffusion, section 4.5, with the steps of the authors' script of November 2022: image-to-text up to the
latent; the part of it that lies along the removed words' latent is taken out, and the added words' latent put in; what
the text VAE reads from it, and the added words themselves, draw the new image together with the style of the old.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdtrain.config.compose import ConfigError
from vdtrain.diffusion.contexts import joined, low_rank, make_mixing
from vdtrain.diffusion.sampling import Progress
from vdtrain.models.diffuser import Context
from vdtrain.pipeline import VersatileDiffusion

IMAGE, TEXT = "image", "text"


def edit(
    model: VersatileDiffusion,
    images: Tensor,
    remove: str = "",
    add: str = "",
    *,
    text_share: float = 0.67,
    style_rank: int = 10,
    progress: Progress = list,
    **settings: Any,
) -> tuple[Tensor, list[str]]:
    """Edit images by words.

    Args:
        images: uint8 [B, 3, h, w].
        remove: what to take out; "" takes nothing out.
        add: what to put in; "" puts nothing in.
        text_share: of the text in drawing the new image; the old image's style has the rest.
        style_rank: components of the old image's context that count as its style.
        settings: fields of `SamplingConfig`.

    Returns:
        The new images, uint8 [B, 3, H, W], and the captions that the changed latents read as.

    Raises:
        ConfigError: the model lacks a flow that this needs, or a setting that cannot work.
    """
    if not remove and not add:
        raise ConfigError("remove, add: both empty; say what to take out, what to put in, or both")
    if not 0 < text_share < 1 or style_rank < 1:
        raise ConfigError(f"text_share={text_share}, style_rank={style_rank}: choose 0 to 1, and at least 1")
    for name in ("image-to-text", "image-to-image", "text-to-image"):
        model.flow(name)
    chosen = model.settings(settings)
    seen = model.encode_context(IMAGE, images, chosen.batch_size)
    latents = model.sample(TEXT, [Context(IMAGE, seen)], chosen, progress=progress, decode=False)
    captions = model.decode(TEXT, changed(model, latents, remove, add), chosen.seed)
    texts = [Context(TEXT, model.encode_context(TEXT, captions, chosen.batch_size))]
    if add:
        texts.append(Context(TEXT, model.encode_context(TEXT, [add]).expand(len(captions), -1, -1)))
    text = joined(texts, [1.0] * len(texts))
    style = Context(IMAGE, low_rank(seen[:, 1:], style_rank))
    blank = model.unconditional(IMAGE, IMAGE)[:, 1:]
    drawn = model.sample(
        IMAGE,
        [text, style],
        chosen,
        unconditional=[
            Context(TEXT, model.unconditional(IMAGE, TEXT).repeat(1, len(texts), 1)),
            Context(IMAGE, blank),
        ],
        mixing=make_mixing("attention", [text_share, 1 - text_share], len(model.diffuser.plan.context_steps), 0),
        progress=progress,
    )
    return drawn, captions


def changed(model: VersatileDiffusion, latents: Tensor, remove: str, add: str) -> Tensor:
    """Text latents [B, D] without their part along `remove`, and with the latent of `add` on top."""
    if remove:
        (direction,) = model.encode_latents(TEXT, [remove]).float()
        direction = direction / direction.norm()
        latents = latents - (latents @ direction)[:, None] * direction
    if add:
        latents = latents + model.encode_latents(TEXT, [add]).float()
    return latents
