"""Self-contained HTML pages: one file with its style, script, data and images, which loads nothing from elsewhere.

Templates escape all text. The page's own policy (CSP) also forbids every script and style but the two that stand here,
so that a caption or a setting that looks like a script stays text.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

import vdtrain
from vdtrain.errors import ConfigError, unwritable
from vdtrain.files import check_output, opened, refuse_folder, write_text, written_whole

PAGES = Path(__file__).parent / "pages"
QUALITY = 82
# In the head of our pages alone: a part of their policy.
MARK, HEAD_BYTES = b"img-src data:; style-src", 4096
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def check_page(path: Path, place: str, overwrite: bool) -> None:
    """Before the work: refuse a place that cannot be written, and a file that is not an earlier page of ours.

    Such a page is made of what is there now, and is replaced with a word.

    Raises:
        ConfigError: it cannot be written, or must not be replaced.
    """
    check_output(path.absolute().parent, place)
    refuse_folder(path, place)
    if not path.exists() or overwrite:
        return
    try:
        with opened(path) as file:
            own = MARK in file.read(HEAD_BYTES)
    except ValueError:
        own = False
    except OSError as error:
        raise ConfigError(f"{place}: {unwritable(error, path)}") from error
    if not own:
        raise ConfigError(f"{place}: {path} exists already and is no page of ours; overwrite=true replaces it")
    print(f"note: {path}: the earlier page is replaced", file=sys.stderr, flush=True)


def write_page(path: Path, place: str, name: str, data: Any, **values: Any) -> None:
    """Write the page of the template `pages/NAME.html`, with NAME.js and `data`, which that script reads.

    Args:
        place: setting and value that `path` comes from, for errors.
        values: of the template.

    Raises:
        ConfigError: it cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = ((PAGES / file).read_text(encoding="utf-8") for file in ("style.css", f"{name}.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    text = environment.get_template(f"{name}.html").render(
        values, policy=policy, style=Markup(style), script=Markup(script), data=_json(data), version=vdtrain.__version__
    )
    with written_whole(path, place, overwrite=True) as draft:
        # A file name that is not UTF-8 has characters that no text can hold.
        write_text(draft, text.encode("utf-8", "replace").decode())


def embedded(image: Image.Image, side: int, quality: int = QUALITY) -> str:
    """An image as the address of its own content (`data:`), without metadata, its longer side at most `side` pixels."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)] if most > 1 else [items[-1]]


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: Any) -> Markup:
    """Data for a script element, which the first `</` would end."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
