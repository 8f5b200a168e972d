"""Prints statistics of a manifest, and draws a contact sheet: images in a grid with their captions below."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_pipeline.index.repeated import left_out, repeated_images, repeated_uids
from vdtrain.config.data_schema import InspectConfig
from vdtrain.data.decode import DecodeError, decode_whole
from vdtrain.data.manifest import Manifest, read_shards
from vdtrain.data.shards import ShardReader, StreamError
from vdtrain.files import refuse_existing, written_whole
from vdtrain.grid import font_of, wrap
from vdtrain.progress import track

COLUMNS = 8
MARGIN = 8
FONT_PIXELS = 12
LINE = FONT_PIXELS + 4
CAPTION_LINES = 4
BACKGROUND, INK, FAINT = "white", "black", "#777777"


@dataclass(frozen=True)
class Pair:
    """A pair to show."""

    image: Image.Image | None  # None if it cannot be shown
    caption: str
    note: str  # source and size of the image, or why there is none


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
    """Write pairs as PNG, in rows of COLUMNS, each in a square of `pixels`; a ConfigError if it cannot be written."""
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


SIDES = (0, 64, 128, 256, 384, 512, 768, 1024)
STAGES = (256, 512)
ASPECT_RATIOS = (0.0, 0.5, 0.667, 0.8, 1.25, 1.5, 2.0)
BAR = 40
REASONS = 8


def inspect(folder: Path, config: InspectConfig) -> None:
    """Print statistics of a manifest, and draw some of its pairs.

    Raises:
        ConfigError: a setting cannot work, or the contact sheet cannot be written, or stands there already.
        ManifestError: the folder holds no manifest, or a damaged one.
    """
    output = Path(config.output) if config.output is not None else folder.parent / "inspect.png"
    if config.images:
        refuse_existing(output, f"data.inspect.output={output}", config.overwrite, "data.inspect.overwrite")
    manifest = Manifest(folder)
    generator = np.random.default_rng(config.seed)
    print(f"{folder}\n")
    print("\n".join(_sources(manifest)))
    if len(manifest):
        print("\nshortest side, pixels:")
        above = [int(manifest.counts(side).sum()) for side in SIDES]
        print("\n".join(_bars(SIDES, -np.diff([*above, 0]))))
        drawn = np.sort(generator.choice(len(manifest.paths), min(config.shards, len(manifest.paths)), replace=False))
        print("\n".join(_samples(manifest, drawn)))
    commonest = left_out(read_shards(folder), manifest).most_common(REASONS)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in commonest)
    print(f"\nleft out: {reasons or 'none'}")
    repeated = repeated_uids(manifest)
    about = "" if repeated.compared == 1 else "about "
    example = f", as in {repeated.example[0]} and {repeated.example[1]}" if repeated.example else ""
    print(f"listed more than once: {about}{repeated.samples:,}{example}")
    images = repeated_images(manifest)
    print(f"one image more than once: {images.text(manifest)}")
    count = min(config.images, len(manifest))
    if count:
        places = [(each.shard, each.row, f"{each.times:,} times") for each in images.frequent]
        pairs = itertools.chain(draw_pairs(manifest, generator, count), read_pairs(manifest, places))
        write_contact_sheet(output, pairs, config.pixels)
        more = f", and the {len(places)} most frequent images" if places else ""
        print(f"contact sheet of {count} pairs, drawn at random{more}: {output}")


def _sources(manifest: Manifest) -> list[str]:
    """A table of the sources and their sum."""
    enough = [manifest.counts(side) for side in STAGES]
    groups = {name: manifest.sources == number for number, name in enumerate(manifest.source_names)}
    groups["all"] = np.ones(len(manifest.paths), bool)
    rows = [("source", "shards", "samples", "gigabytes", "kB/sample", *(f">= {side} px" for side in STAGES))]
    for name, mask in groups.items():
        samples, size = int((manifest.samples - manifest.left_out)[mask].sum()), int(manifest.bytes[mask].sum())
        shares = [f"{int(each[mask].sum()) / max(samples, 1):.1%}" for each in enough]
        mean = size / max(samples, 1) / 1e3
        rows.append((name, f"{mask.sum():,}", f"{samples:,}", f"{size / 1e9:,.2f}", f"{mean:,.1f}", *shares))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _samples(manifest: Manifest, shards: NDArray[np.int64]) -> list[str]:
    """Statistics that need the samples, from some shards."""
    ratios, characters, words, turned = [], [], [], 0
    for shard in track(shards.tolist(), "samples", "shards"):
        table = manifest.columns(shard, ["width", "height", "orientation", "caption"])
        ratios.append(table["width"].to_numpy() / table["height"].to_numpy())
        captions = table["caption"]
        characters.append(pc.utf8_length(captions).to_numpy())
        words.append(pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(captions))).to_numpy())
        turned += pc.sum(pc.not_equal(table["orientation"], pa.scalar(1, pa.int8())), min_count=0).as_py()
    every = np.concatenate(ratios)
    counts = np.histogram(every, [*ASPECT_RATIOS, np.inf])[0]
    of = "all" if len(shards) == len(manifest.paths) else f"{len(shards):,} of {len(manifest.paths):,}"
    lines = ["", f"from {of} shards{', drawn at random' if of != 'all' else ''}, {len(every):,} samples:", ""]
    lines += ["width over height:", *_bars(ASPECT_RATIOS, counts), ""]
    for name, lengths in (("characters", np.concatenate(characters)), ("words", np.concatenate(words))):
        if len(lengths):
            median, high = np.percentile(lengths, (50, 95))
            mean = f"{lengths.mean():.1f} in the mean"
            lines.append(f"{name} of a caption: {mean}, median {median:.0f}, 95th percentile {high:.0f}")
    return [*lines, f"stored turned or mirrored, by EXIF: {turned / max(len(every), 1):.1%}"]


def _bars(edges: Sequence[float], counts: NDArray[np.int64]) -> list[str]:
    """A histogram in text."""
    names = [*(f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)), f"{edges[-1]:g} and more"]
    width, most, total = max(map(len, names)), max(1, int(counts.max())), max(1, int(counts.sum()))
    return [
        f"  {name:>{width}}  {count / total:>6.1%}  {'#' * round(BAR * count / most)}".rstrip()
        for name, count in zip(names, counts.tolist(), strict=True)
    ]
