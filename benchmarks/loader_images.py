"""Shards for benchmarks/loader.py: JPEG images with the statistics of photographs, and long-tailed captions.

The shards lie as img2dataset leaves them: 512 pixels on the shortest side, quality 88 to 95, mixed aspect ratios, about
1.5 bits per pixel (64 KB), as the web's photographs have at this size; every member with its text and JSON beside it.
"""

from __future__ import annotations

import io
import json
import tarfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer

from data_pipeline.index.index import index
from vdtrain.models.tokenizers import ENCODER_SPECIALS, WORD_END, released_tokenizer

SHORTEST = 512
ASPECTS = ((1, 1), (1, 1), (4, 3), (4, 3), (3, 2), (16, 9), (3, 4), (2, 3))
# Standard deviations of noise, by the side of its cells in pixels: what lies far apart differs more.
OCTAVES = ((64, 30.0), (16, 16.0), (4, 9.0), (1, 3.9))


def write_set(folder: Path, shards: int, samples: int, processes: int) -> None:
    """Tar shards in `folder`/shards, their manifest, and tokenizers, tokenizer.json (CLIP's) and bert.json."""
    (folder / "shards").mkdir(parents=True)
    tasks = [(folder / "shards" / f"{number:05d}.tar", samples, number) for number in range(shards)]
    with get_context("spawn").Pool(processes) as pool:
        pool.starmap(write_shard, tasks)
    index({"photographs": folder / "shards"}, folder / "manifest")
    released_tokenizer().save(str(folder / "tokenizer.json"))
    word_pieces().save(str(folder / "bert.json"))


def write_shard(path: Path, samples: int, seed: int) -> None:
    """A finished shard with its statistics."""
    generator = np.random.default_rng(seed)
    words = vocabulary()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            key = f"{seed:05d}{number:04d}"
            image, text = photograph(generator), caption(generator, words)
            file = io.BytesIO()
            image.save(file, "JPEG", quality=int(generator.integers(88, 96)))
            described = {
                **{"caption": text, "url": f"http://127.0.0.1/{key}.jpg", "key": key, "status": "success"},
                **{"width": image.width, "height": image.height, "exif": "{}"},
            }
            members = {"jpg": file.getvalue(), "json": json.dumps(described, indent=4).encode(), "txt": text.encode()}
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    path.with_name(path.stem + "_stats.json").write_text(json.dumps({"status_dict": {"success": samples}}))


def photograph(generator: np.random.Generator) -> Image.Image:
    """Noise of several scales with edged shapes in it."""
    across, down = ASPECTS[generator.integers(len(ASPECTS))]
    width, height = SHORTEST * across // min(across, down), SHORTEST * down // min(across, down)
    levels = np.zeros((height, width, 3), np.float32)
    levels += generator.uniform(60, 200, 3).astype(np.float32)
    for side, deviation in OCTAVES:
        # The eye's colour is coarse, and so is that of photographs.
        channels = 3 if side >= 16 else 1
        cells = generator.standard_normal((height // side + 2, width // side + 2, channels), np.float32)
        levels += deviation * generator.uniform(0.4, 1.6) * enlarged(cells, width, height)
    image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    over = image.copy()
    pen = ImageDraw.Draw(over)
    for _ in range(int(generator.integers(4, 14))):
        x, y = generator.uniform(0, width), generator.uniform(0, height)
        reach = generator.uniform(10, SHORTEST / 3, 2)
        box = (x - reach[0], y - reach[1], x + reach[0], y + reach[1])
        colour = tuple(int(level) for level in generator.integers(0, 256, 3))
        (pen.ellipse if generator.random() < 0.5 else pen.rectangle)(box, fill=colour)
    over = over.filter(ImageFilter.GaussianBlur(0.8))
    # Shapes keep some of the noise: no surface of a photograph is even.
    return Image.blend(image, over, 0.55)


def enlarged(cells: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """Cells [h, w, c] stretched smoothly to [height, width, c]."""
    planes = [
        np.asarray(Image.fromarray(cells[..., channel]).resize((width, height), Image.Resampling.BILINEAR))
        for channel in range(cells.shape[-1])
    ]
    return np.stack(planes, axis=-1)


def vocabulary() -> list[str]:
    """Words of CLIP's vocabulary, the frequent ones first."""
    numbers = released_tokenizer().get_vocab()
    # After the bytes, which come alone and as ends of words.
    ended = [entry for entry in sorted(numbers, key=numbers.__getitem__)[2 * 256 :] if entry.endswith(WORD_END)]
    return [word.removesuffix(WORD_END) for word in ended if word.removesuffix(WORD_END).isalpha()]


def word_pieces() -> Tokenizer:
    """A tokenizer of BERT's kind and size (28,996 entries); BERT's own vocabulary costs the same."""
    characters = sorted({character for word in vocabulary() for character in word} | set("0123456789.,-'"))
    pieces = [*ENCODER_SPECIALS, "[UNK]", *characters, *("##" + character for character in characters)]
    entries = list(dict.fromkeys([*pieces, *vocabulary()]))[:28_996]
    tokenizer = Tokenizer(WordPiece({entry: number for number, entry in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


def caption(generator: np.random.Generator, words: list[str]) -> str:
    """About 11 words, frequent and rare; some are names that no vocabulary has."""
    count = int(generator.integers(5, 18))
    ranks = (generator.zipf(1.15, 2 * count) - 1) % len(words)
    chosen = [words[rank] for rank in ranks]
    rare = generator.random(count) < 0.12
    said = [chosen[2 * i] + chosen[2 * i + 1] if rare[i] else chosen[2 * i] for i in range(count)]
    return " ".join(said).capitalize()
