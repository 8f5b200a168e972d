"""A contact sheet: images in a grid with their captions below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vdtrain.data.decode import DecodeError, decode_whole
from vdtrain.data.manifest import Manifest
from vdtrain.data.shards import ShardReader, StreamError
from vdtrain.files import written_whole
from vdtrain.grid import font_of, wrap

COLUMNS = 8
MARGIN = 8
FONT_PIXELS = 12
LINE = FONT_PIXELS + 4
CAPTION_LINES = 4
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
    """`count` different pairs of a manifest, drawn uniformly among those that take part."""
    ends = np.cumsum(manifest.counts(0))
    drawn = generator.choice(int(ends[-1]), count, replace=False)
    shards = np.searchsorted(ends, drawn, side="right")
    places = []
    for place, shard in zip(drawn.tolist(), shards.tolist(), strict=True):
        taking_part = np.flatnonzero(manifest.rows(shard).side >= 1)
        places.append((shard, int(taking_part[place - ends[shard]]), ""))
    return read_pairs(manifest, places)


def read_pairs(manifest: Manifest, places: Iterable[tuple[int, int, str]]) -> Iterator[Pair]:
    """The pairs at some places: numbers of the shard and of the row there, and a remark that begins the note."""
    reader = ShardReader(manifest)
    try:
        for shard, row, remark in places:
            rows = manifest.rows(shard)
            source = "  ".join(filter(None, (remark, manifest.source_names[manifest.sources[shard]])))
            caption = rows.captions[row].as_py()
            try:
                data = bytes(reader.image(shard, rows, row))
                image = Image.fromarray(decode_whole(data, int(rows.orientation[row])))
                yield Pair(image, caption, f"{source}  {image.width} x {image.height}")
            except (DecodeError, StreamError) as error:
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


def _cell(pair: Pair, pixels: int) -> Image.Image:
    font = font_of(FONT_PIXELS)
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
