"""A contact sheet: images in a grid with their captions below."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vdtrain.data.decode import FORMATS, IMAGE_ERRORS, DecodeError, image_size, upright
from vdtrain.data.manifest import Manifest
from vdtrain.data.shards import ShardReader, StreamError
from vdtrain.files import written_whole

COLUMNS = 8
MARGIN = 8
FONT_PIXELS = 12
LINE = FONT_PIXELS + 4
CAPTION_LINES = 4
ELLIPSIS = "..."
BACKGROUND, INK, FAINT = "white", "black", "#777777"


@dataclass(frozen=True)
class Pair:
    """A pair to show.

    Attributes:
        image: None if it cannot be shown.
        note: source and size of the image, or why there is none.
    """

    image: Image.Image | None
    caption: str
    note: str


def draw_pairs(manifest: Manifest, generator: np.random.Generator, count: int) -> Iterator[Pair]:
    """`count` different pairs of a manifest, drawn uniformly."""
    ends = np.cumsum(manifest.samples)
    reader = ShardReader(manifest)
    try:
        for place in generator.choice(int(ends[-1]), count, replace=False):
            shard = int(np.searchsorted(ends, place, side="right"))
            rows = manifest.rows(shard)
            number = int(place - (ends[shard] - manifest.samples[shard]))
            source = manifest.source_names[manifest.sources[shard]]
            caption = rows.captions[number].as_py()
            try:
                data = bytes(reader.read(shard, int(rows.offset[number]), int(rows.size[number])))
                image = _image(data, int(rows.orientation[number]))
                yield Pair(image, caption, f"{source}  {image.width} x {image.height}")
            except (DecodeError, StreamError, *IMAGE_ERRORS) as error:
                yield Pair(None, caption, f"{source}  {error}")
    finally:
        reader.close()


def write_contact_sheet(path: Path, pairs: Iterable[Pair], pixels: int) -> None:
    """Write pairs as a PNG file, in rows of COLUMNS.

    Args:
        pixels: side of the square that each image must fit into.

    Raises:
        ConfigError: it cannot be written.
    """
    cells = [_cell(pair, pixels) for pair in pairs]
    columns = min(COLUMNS, len(cells))
    width, height = cells[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), BACKGROUND)
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * width, number // columns * height))
    with written_whole(path, f"data.inspect.output={path}", overwrite=True) as draft:
        sheet.save(draft, "PNG")


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
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


def _image(data: bytes, orientation: int) -> Image.Image:
    """An image turned upright, in full size."""
    image_size(data)
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        return Image.fromarray(np.ascontiguousarray(upright(np.asarray(file.convert("RGB")), orientation)))


def _cell(pair: Pair, pixels: int) -> Image.Image:
    font = ImageFont.load_default(FONT_PIXELS)
    cell = Image.new("RGB", (pixels + 2 * MARGIN, pixels + 2 * MARGIN + (CAPTION_LINES + 1) * LINE), BACKGROUND)
    draw = ImageDraw.Draw(cell)
    if pair.image is None:
        draw.rectangle((MARGIN, MARGIN, MARGIN + pixels - 1, MARGIN + pixels - 1), outline=FAINT)
    else:
        pair.image.thumbnail((pixels, pixels))
        left, top = (pixels - pair.image.width) // 2, (pixels - pair.image.height) // 2
        cell.paste(pair.image, (MARGIN + left, MARGIN + top))
    below = pixels + 2 * MARGIN
    draw.text((MARGIN, below), wrap(pair.note, font, pixels, 1)[0], FAINT, font)
    for number, line in enumerate(wrap(pair.caption, font, pixels, CAPTION_LINES), start=1):
        draw.text((MARGIN, below + number * LINE), line, INK, font)
    return cell
