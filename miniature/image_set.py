"""The drawn image set on disk: JPEG files, and their metadata as LAION-2B-en and COYO-700M publish theirs.

python -m miniature draw data=shapes
python -m miniature serve data=shapes      # serve them on this machine for the real download
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from miniature.shapes import caption, draw, sample_scene
from vdtrain.config.data_schema import ShapesConfig
from vdtrain.files import atomic_write
from vdtrain.progress import track

HOST = "127.0.0.1"
COMPLETE_FILE = "complete.json"
JPEG_QUALITY = 95
# Share of the images in the LAION table; the COYO table has the others.
LAION_SHARE = 0.6


def write_image_set(config: ShapesConfig) -> None:
    """Draw the set into its folder, unless a complete set with the same settings is there.

    Held-out pairs of colour and shape are not drawn.
    """
    folder = Path(config.folder)
    settings = {"images": config.images, "pixels": config.pixels, "seed": config.seed, "port": config.port}
    marker = folder / COMPLETE_FILE
    # A damaged marker counts as missing.
    with suppress(ValueError):
        if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == settings:
            print(f"{folder}: complete")
            return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(config.seed)
    laion, coyo = [], []
    for number in track(range(config.images), "draw", "images"):
        scene = sample_scene(generator)
        name = f"images/{number:06d}.jpg"
        Image.fromarray(draw(scene, config.pixels)).save(folder / name, quality=JPEG_QUALITY)
        url, text = f"http://{HOST}:{config.port}/{name}", caption(scene, generator)
        if number < LAION_SHARE * config.images:
            laion.append(_laion_row(number, url, text, config.pixels))
        else:
            coyo.append(_coyo_row(number, url, text, config.pixels))
    pq.write_table(pa.Table.from_pylist(laion, schema=LAION_SCHEMA), folder / "laion2b_en.parquet")
    pq.write_table(pa.Table.from_pylist(coyo, schema=COYO_SCHEMA), folder / "coyo700m.parquet")
    with atomic_write(marker) as draft:
        draft.write_text(json.dumps(settings), encoding="utf-8")
    print(f"{folder}: {len(laion):,} images in laion2b_en.parquet, {len(coyo):,} in coyo700m.parquet")


def serve(config: ShapesConfig) -> None:
    """Serve the set's folder to this machine alone, until interrupted.

    Raises:
        OSError: the port is taken.
    """
    handler = partial(_QuietHandler, directory=config.folder)
    with ThreadingHTTPServer((HOST, config.port), handler) as server:
        server.serve_forever()


class _QuietHandler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests."""


def _laion_row(number: int, url: str, text: str, pixels: int) -> dict[str, Any]:
    return {
        "SAMPLE_ID": number,
        "URL": url,
        "TEXT": text,
        "HEIGHT": np.int32(pixels),
        "WIDTH": np.int32(pixels),
        "LICENSE": "?",
        "NSFW": "UNLIKELY",
        "similarity": 0.35,
    }


def _coyo_row(number: int, url: str, text: str, pixels: int) -> dict[str, Any]:
    words = text.split()
    return {
        "id": number,
        "url": url,
        "text": text,
        "width": pixels,
        "height": pixels,
        "image_phash": hashlib.sha256(url.encode()).hexdigest()[:16],
        "text_length": len(text),
        "word_count": len(words),
        "num_tokens_bert": len(words),
        "num_tokens_gpt": len(words),
        "num_faces": 0,
        "clip_similarity_vitb32": 0.3,
        "clip_similarity_vitl14": 0.3,
        "nsfw_score_opennsfw2": 0.01,
        "nsfw_score_gantman": 0.01,
        "watermark_score": 0.01,
        "aesthetic_score_laion_v2": 5.0,
    }


# The types of the columns are those of a row's values.
LAION_SCHEMA, COYO_SCHEMA = (pa.Table.from_pylist([row(0, "", "", 0)]).schema for row in (_laion_row, _coyo_row))
