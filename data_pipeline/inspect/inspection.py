"""Prints statistics of a manifest and draws a contact sheet."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.index.repeated import repeated_uids
from data_pipeline.index.repeated_images import REPEATED_IMAGE, repeated_images
from data_pipeline.inspect.contact_sheet import draw_pairs, read_pairs, write_contact_sheet
from vdtrain.config.data_schema import InspectConfig
from vdtrain.data.manifest import Manifest, read_shards
from vdtrain.files import refuse_existing
from vdtrain.progress import track

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
        print("\n".join(_bars(_ranges(SIDES), _side_counts(manifest))))
        drawn = np.sort(generator.choice(len(manifest.paths), min(config.shards, len(manifest.paths)), replace=False))
        print("\n".join(_samples(manifest, drawn)))
    broken: Counter[str] = Counter()
    for line in read_shards(folder)["broken"].to_pylist():
        broken.update(json.loads(line))
    broken += Counter({REPEATED_IMAGE: int(manifest.left_out.sum())})
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in broken.most_common(REASONS))
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


def _side_counts(manifest: Manifest) -> NDArray[np.int64]:
    """Number of samples between each of SIDES and the next."""
    above = [int(manifest.counts(side).sum()) for side in SIDES]
    return -np.diff([*above, 0])


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
    lines += ["width over height:", *_bars(_ranges(ASPECT_RATIOS), counts), ""]
    for name, lengths in (("characters", np.concatenate(characters)), ("words", np.concatenate(words))):
        if len(lengths):
            median, high = np.percentile(lengths, (50, 95))
            mean = f"{lengths.mean():.1f} in the mean"
            lines.append(f"{name} of a caption: {mean}, median {median:.0f}, 95th percentile {high:.0f}")
    return [*lines, f"stored turned or mirrored, by EXIF: {turned / max(len(every), 1):.1%}"]


def _ranges(edges: Sequence[float]) -> list[str]:
    return [
        *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)),
        f"{edges[-1]:g} and more",
    ]


def _bars(names: Sequence[str], counts: NDArray[np.int64]) -> list[str]:
    """A histogram in text."""
    width, most, total = max(map(len, names)), max(1, int(counts.max())), max(1, int(counts.sum()))
    return [
        f"  {name:>{width}}  {count / total:>6.1%}  {'#' * round(BAR * count / most)}".rstrip()
        for name, count in zip(names, counts.tolist(), strict=True)
    ]
