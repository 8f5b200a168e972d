"""A captioned image set that the project draws itself: coloured shapes on plain backgrounds.

Shape, colour, size, position and background vary, and each image is captioned in one of several wordings. Some
pairs of colour and shape (`HELD_OUT`) are never drawn for training, so that a model's images of them are its own.
Everything here is a pure function of its arguments; writing files is `miniature.image_set`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

# Far apart in RGB from each other and from every background, so that a reader of pixels cannot confuse them.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "green": (25, 150, 45),
    "blue": (35, 65, 215),
    "yellow": (245, 220, 25),
    "orange": (250, 130, 10),
    "purple": (120, 30, 160),
    "cyan": (45, 205, 220),
    "pink": (250, 135, 190),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
SIZES: dict[str, float] = {"small": 0.50, "medium": 0.62, "large": 0.75}
"""Width of a shape as a share of the canvas."""
POSITIONS: dict[str, tuple[float, float]] = {
    "centre": (0.0, 0.0),
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "top": (0.0, -1.0),
    "bottom": (0.0, 1.0),
}
"""Direction of a shape from the middle of the canvas, x to the right and y downwards."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (130, 130, 130),
    "black": (15, 15, 15),
}
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {("purple", "circle"), ("green", "square"), ("blue", "triangle"), ("red", "star"), ("yellow", "cross")}
)
"""(colour, shape) pairs that no training image shows: each shape once, each in another colour."""

WORDINGS: tuple[str, ...] = (
    "a {colour} {shape}",
    "a {size} {colour} {shape}",
    "a picture of a {colour} {shape}",
    "a drawing of a {size} {colour} {shape}",
    "the {shape} is {colour} and {size}",
    "a {colour} {shape} at the {position}",
    "there is a {colour} {shape} at the {position} of the picture",
    "a {colour} {shape} on a {background} background",
    "a {size} {colour} {shape} at the {position} on {background}",
    "a {background} background with a {size} {colour} {shape}",
)

SUPERSAMPLING = 4
STAR_INNER_RADIUS = 0.4
CROSS_ARM = 0.36
SQUARE_SIDE = 0.9


@dataclass(frozen=True)
class Jitter:
    """How one image differs from the plain drawing of its words. Lengths are shares of the canvas."""

    span: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0
    """Degrees, counter-clockwise."""
    tint: tuple[int, int, int] = (0, 0, 0)
    """Added to the shape's RGB."""
    shade: int = 0
    """Added to the background's RGB."""


@dataclass(frozen=True)
class Scene:
    """What one image shows, in the words that captions use."""

    shape: str
    colour: str
    size: str = "medium"
    position: str = "centre"
    background: str = "white"
    jitter: Jitter = field(default_factory=Jitter)


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a scene uniformly from the trained combinations, or from the held-out ones."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) == held_out]
    colour, shape = pairs[int(rng.integers(len(pairs)))]
    shift = rng.uniform(-0.02, 0.02, 2)
    tint = rng.integers(-10, 11, 3)
    return Scene(
        shape=shape,
        colour=colour,
        size=_pick(rng, list(SIZES)),
        position=_pick(rng, list(POSITIONS)),
        background=_pick(rng, list(BACKGROUNDS)),
        jitter=Jitter(
            span=float(rng.uniform(-0.03, 0.03)),
            shift=(float(shift[0]), float(shift[1])),
            angle=float(rng.uniform(-8.0, 8.0)),
            tint=(int(tint[0]), int(tint[1]), int(tint[2])),
            shade=int(rng.integers(-10, 11)),
        ),
    )


def draw(scene: Scene, pixels: int) -> npt.NDArray[np.uint8]:
    """Draw a scene, antialiased.

    Args:
        scene: what to draw.
        pixels: side of the square image.

    Returns:
        uint8 [pixels, pixels, 3], RGB.
    """
    jitter = scene.jitter
    span = SIZES[scene.size] + jitter.span
    # The reach towards a side is what the shape leaves free, so that no shape is cut by the canvas.
    reach = 0.85 * (1.0 - span) / 2
    centre = np.array([0.5 + reach * d + s for d, s in zip(POSITIONS[scene.position], jitter.shift, strict=True)])
    side = pixels * SUPERSAMPLING
    points = (centre + span * _turned(outline(scene.shape), jitter.angle)) * side
    canvas = Image.new("RGB", (side, side), _shifted(BACKGROUNDS[scene.background], (jitter.shade,) * 3))
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in points], fill=_shifted(COLOURS[scene.colour], jitter.tint))
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def outline(shape: str) -> npt.NDArray[np.float64]:
    """Corners of a shape around the origin in a box of side 1: float64 [corners, 2], x to the right and y down."""
    if shape == "circle":
        return _ring(np.full(64, 0.5))
    if shape == "square":
        half = SQUARE_SIDE / 2
        return np.array([(-half, -half), (half, -half), (half, half), (-half, half)])
    if shape == "triangle":
        return np.array([(0.0, -0.46), (0.5, 0.42), (-0.5, 0.42)])
    if shape == "star":
        return np.add(_ring(np.tile([0.54, 0.54 * STAR_INNER_RADIUS], 5)), (0.0, 0.04))
    if shape == "cross":
        a, b = CROSS_ARM / 2, 0.5
        return np.array(
            [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        )
    raise ValueError(f"shape {shape!r} is none of {', '.join(SHAPES)}")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in one of `WORDINGS`: lower case, at most 14 words, always with colour and shape."""
    text = _pick(rng, WORDINGS).format(
        shape=scene.shape, colour=scene.colour, size=scene.size, position=scene.position, background=scene.background
    )
    return text.replace("a orange", "an orange")


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    words = {*COLOURS, *SHAPES, *SIZES, *POSITIONS, *BACKGROUNDS, "an"}
    for wording in WORDINGS:
        words.update(word for word in wording.split() if not word.startswith("{"))
    return sorted(words)


def _pick(rng: np.random.Generator, choices: list[str] | tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _ring(radii: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Points at the given distances from the origin, evenly spread in angle, the first one at the top."""
    angles = np.linspace(0.0, 2 * math.pi, len(radii), endpoint=False)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _turned(points: npt.NDArray[np.float64], degrees: float) -> npt.NDArray[np.float64]:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.stack([points[:, 0] * cosine + points[:, 1] * sine, points[:, 1] * cosine - points[:, 0] * sine], axis=1)


def _shifted(colour: tuple[int, int, int], by: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(max(c + d, 0), 255) for c, d in zip(colour, by, strict=True))
