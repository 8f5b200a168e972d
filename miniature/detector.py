"""Reads colour and shape out of an image's pixels, or out of a caption's words. No model takes part."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from miniature.shapes import COLOURS, SHAPES, outline

Floats = npt.NDArray[np.float32]

GRID = 32
"""Side of the grid on which masks are compared."""
WINDOW = 2.2
"""Side of that grid in units of the mask's own size, the square root of its area: all of a cross or a star is in it."""
SMALLEST_MASK = 4.0
"""Area in pixels below which a mask has no shape to speak of."""


def detect(image: npt.NDArray[np.uint8]) -> tuple[str, str]:
    """Name the colour and the shape of the object in an image.

    Always answers: on an image that shows nothing the answer is a guess.

    Args:
        image: uint8 [H, W, 3], RGB.

    Returns:
        (colour, shape), each one of the words of `miniature.shapes`.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is [H, W, 3], not {list(image.shape)}")
    foreground, mask = _separate(image.astype(np.float32))
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], dtype=np.float32)
    colour = names[int(np.argmin(((palette - foreground) ** 2).sum(axis=1)))]
    templates, shapes = _templates()
    aligned = _aligned(mask).ravel()
    shared = templates @ aligned
    overlap = shared / (templates.sum(axis=1) + aligned.sum() - shared)
    return colour, shapes[int(np.argmax(overlap))]


def caption_attributes(text: str) -> tuple[str | None, str | None]:
    """Read (colour, shape) from a caption; None where it names none, or more than one."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    colours = [word for word in COLOURS if word in words]
    shapes = [word for word in SHAPES if word in words]
    return (colours[0] if len(colours) == 1 else None, shapes[0] if len(shapes) == 1 else None)


def _separate(image: Floats) -> tuple[Floats, Floats]:
    """Split an image float32 [H, W, 3] into the foreground's colour [3] and its mask [H, W] in 0..1."""
    height, width = image.shape[:2]
    rim = max(1, min(height, width) // 16)
    border = np.concatenate(
        [part.reshape(-1, 3) for part in (image[:rim], image[-rim:], image[:, :rim], image[:, -rim:])]
    )
    background = np.median(border, axis=0)
    distance = np.sqrt(((image - background) ** 2).sum(axis=2))
    # The smallest shape covers 7 % of the canvas, so the 96th percentile lies inside every shape, but not on noise.
    far = float(np.quantile(distance, 0.96))
    foreground = np.median(image[distance >= 0.75 * far], axis=0)
    direction = foreground - background
    share = ((image - background) @ direction) / max(float(direction @ direction), 1e-6)
    # Twice the slope around one half: edges stay soft, noise on either plateau is cut off.
    return foreground, np.clip(2 * share - 0.5, 0, 1).astype(np.float32)


def _aligned(mask: Floats) -> Floats:
    """Resample a mask [H, W] to [GRID, GRID] around its centroid, its area scaled to a fixed one."""
    area = float(mask.sum())
    if area < SMALLEST_MASK:
        return np.zeros((GRID, GRID), dtype=np.float32)
    rows, columns = (np.arange(n, dtype=np.float32) + 0.5 for n in mask.shape)
    y, x = float(mask.sum(axis=1) @ rows) / area, float(mask.sum(axis=0) @ columns) / area
    side = WINDOW * area**0.5
    step = side / GRID
    resampled = Image.fromarray(mask).transform(
        (GRID, GRID),
        Image.Transform.AFFINE,
        (step, 0, x - side / 2, 0, step, y - side / 2),
        resample=Image.Resampling.BILINEAR,
    )
    return np.asarray(resampled)


@cache
def _templates() -> tuple[Floats, list[str]]:
    """Aligned masks [templates, GRID * GRID] of every shape at several angles and sizes, and the shape of each."""
    side = 256
    masks, names = [], []
    for shape in SHAPES:
        for angle in (-10, -5, 0, 5, 10):
            canvas = Image.new("F", (side, side), 0.0)
            points = [(float(x), float(y)) for x, y in side / 2 + 0.6 * side * outline(shape)]
            ImageDraw.Draw(canvas).polygon(points, fill=1.0)
            drawn = np.asarray(canvas.rotate(angle, resample=Image.Resampling.BILINEAR))
            # Blurring moves area between arms and notches; the blurred templates stand for small soft images.
            for soft in (1, 16, 32):
                small = _mean(drawn, soft)
                masks.append(_aligned(np.clip(2 * small - 0.5, 0, 1).astype(np.float32)).ravel())
                names.append(shape)
    return np.stack(masks), names


def _mean(mask: Floats, pixels: int) -> Floats:
    """Mean of a mask [H, W] over squares of `pixels`, at the size of the mask."""
    height, width = mask.shape
    small = Image.fromarray(mask).resize((max(width // pixels, 1), max(height // pixels, 1)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
