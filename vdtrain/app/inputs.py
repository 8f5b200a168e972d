"""Uploaded images as their files, so that the readers of `vdtrain sample` decode them, and masks painted on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.components import Component
from PIL import Image

from vdtrain.data.decode import image_size
from vdtrain.media import read_images

# Height and width of an image that a mask is painted on.
PAINTED_PIXELS = 512


def image_file(height: int = 300) -> Component:
    """A place for an image; its value is the file."""
    sources: Any = ["upload", "clipboard"]
    image = gr.Image(label="Image", height=height, type="filepath", sources=sources, buttons=["fullscreen"])
    return _unread(image, lambda payload: payload and payload.path)


def mask_editor() -> Component:
    """A place to paint over what shall be hidden of an image; its value is the files of the paint."""
    brush = gr.Brush(default_size=40, colors=["#111827"], color_mode="fixed")
    nothing: dict[str, Any] = {"sources": [], "transforms": [], "buttons": [], "layers": False}
    editor = gr.ImageEditor(label="Mask", show_label=False, brush=brush, format="png", height=360, **nothing)
    return _unread(editor, lambda payload: [layer.path for layer in payload.layers] if payload else [])


def _unread(component: Any, value: Callable[[Any], Any]) -> Component:
    """A component whose files are not opened. Not a class: Gradio would write an interface file beside this one."""
    component.preprocess = value
    made: Component = component
    return made


def paintable(file: str | None) -> dict[str, Any] | None:
    """An image for a `mask_editor`, cut as the model sees it.

    Raises:
        ConfigError: it is not an image that is read.
    """
    if file is None:
        return None
    (image,) = read_images([file], (PAINTED_PIXELS, PAINTED_PIXELS))
    return {"background": image.permute(1, 2, 0).numpy(), "layers": [], "composite": None}


def write_mask(paint: list[str], file: Path) -> Path | None:
    """A mask file, black where there is paint and white elsewhere; None without any paint."""
    hidden = None
    for path in paint:
        image_size(Path(path).read_bytes())
        with Image.open(path, formats=["PNG", "WEBP"]) as layer:
            alpha = np.asarray(layer.convert("RGBA"))[..., 3] > 0
        hidden = alpha if hidden is None else hidden | alpha
    if hidden is None or not hidden.any():
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)).save(file, "PNG")
    return file
