"""Pictures of samples: a list that a notebook shows, and rows of images and captions in cells of one width."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, SupportsIndex

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
ELLIPSIS = "..."
COLUMNS, MARGIN = 8, 8
# Sides of a cell: smaller images are enlarged by a whole number, larger ones reduced.
LEAST, MOST = 192, 256
TITLE_PIXELS, LABEL_PIXELS, CAPTION_PIXELS = 18, 14, 17
CAPTION_LINES = 8
BACKGROUND, INK, FAINT, FRAME = "white", "black", "#666666", "#dddddd"


class Pictures(list[Image.Image]):
    """Pillow's images, which a notebook shows beside one another. Small ones are enlarged there, and only there."""

    @classmethod
    def of(cls, images: Tensor) -> Pictures:
        """From uint8 [B, 3, H, W]."""
        return cls(Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy())

    def __getitem__(self, place: SupportsIndex | slice) -> Any:
        found: Any = super().__getitem__(place)
        return Pictures(found) if isinstance(place, slice) else found

    def _repr_png_(self) -> bytes | None:
        if not self:
            return None
        file = io.BytesIO()
        grid("", [("", self)]).save(file, "PNG")
        return file.getvalue()


@cache
def font_of(pixels: int) -> Font:
    """A font of that height: one with Greek, Cyrillic and more if it is installed, else Pillow's own."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", pixels)
    except OSError:
        pass
    try:
        from matplotlib import get_data_path

        return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), pixels)
    except (ImportError, OSError):
        return ImageFont.load_default(pixels)


def wrap(text: str, font: Font, width: int, lines: int) -> list[str]:
    """Wrap text to at most `lines` lines of `width` pixels; long words are broken, and cut text ends in an ellipsis."""
    found = [""]
    for word in text.split():
        joined = f"{found[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            found[-1] = joined
            continue
        if found[-1]:
            found.append("")
        for letter in word:
            if found[-1] and font.getlength(found[-1] + letter) > width:
                found.append("")
            found[-1] += letter
        if len(found) > lines:
            break
    if len(found) > lines:
        last = found[lines - 1]
        while last and font.getlength(last + ELLIPSIS) > width:
            last = last[:-1]
        found = [*found[: lines - 1], last + ELLIPSIS]
    return found


def grid(title: str, rows: Sequence[tuple[str, Any]]) -> Image.Image:
    """The picture of some rows, one above the other; after COLUMNS columns they go on below.

    Args:
        title, rows: what is "" takes no room.
        rows: each a label and its samples: uint8 [n, 3, H, W], pictures, or n captions.
    """
    rows = [(label, Pictures.of(samples) if isinstance(samples, Tensor) else samples) for label, samples in rows]
    count = min(len(samples) for _, samples in rows)
    side = max([_side(each) for _, samples in rows for each in samples if not isinstance(each, str)], default=LEAST)
    columns = min(COLUMNS, count)
    width = MARGIN + columns * (side + MARGIN)
    heading = wrap(title, font_of(TITLE_PIXELS), width - 2 * MARGIN, 3) if title else []
    top = MARGIN + len(heading) * (TITLE_PIXELS + 6)
    bands = [range(first, min(first + columns, count)) for first in range(0, count, columns)]
    strips = [
        _strip(label, [samples[number] for number in band], side, width) for band in bands for label, samples in rows
    ]
    sheet = Image.new("RGB", (width, top + sum(strip.height for strip in strips) + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        draw.text((MARGIN, MARGIN + number * (TITLE_PIXELS + 6)), line, INK, font_of(TITLE_PIXELS))
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _side(image: Image.Image) -> int:
    longest = max(image.size)
    return longest * -(-LEAST // longest) if longest < LEAST else min(longest, MOST)


def _strip(label: str, samples: Sequence[Any], side: int, width: int) -> Image.Image:
    """One row of cells below its label."""
    font, line = font_of(CAPTION_PIXELS), CAPTION_PIXELS + 5
    texts = [wrap(each, font, side - 2 * MARGIN, CAPTION_LINES) if isinstance(each, str) else None for each in samples]
    longest = max((len(text) for text in texts if text is not None), default=0)
    height = side if longest == 0 else longest * line + 2 * MARGIN
    above = LABEL_PIXELS + 8 if label else 0
    strip = Image.new("RGB", (width, above + height + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    draw.text((MARGIN, 2), label, FAINT, font_of(LABEL_PIXELS))
    for column, (sample, text) in enumerate(zip(samples, texts, strict=True)):
        left = MARGIN + column * (side + MARGIN)
        if text is None:
            image = _image(sample, side)
            x, y = left + (side - image.width) // 2, above + (side - image.height) // 2
            strip.paste(image, (x, y))
            # White images on a white sheet have an edge too.
            draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=FRAME)
            continue
        draw.rectangle((left, above, left + side - 1, above + height - 1), outline=FRAME)
        for number, words in enumerate(text):
            draw.text((left + MARGIN, above + MARGIN + number * line), words, INK, font)
    return strip


def _image(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    if scale == 1:
        return image
    # Enlarged pixels stay sharp: what a small model makes is not to look better than it is.
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((round(image.width * scale), round(image.height * scale)), kind)
