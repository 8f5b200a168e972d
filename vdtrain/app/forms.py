"""The tabs of the page: what a person fills in, and the settings of a command that come from it.

Uploaded images stay files, so that the readers of `vdtrain sample` decode them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.components import Component
from PIL import Image

from vdtrain.app.desk import Settings
from vdtrain.data.decode import image_size
from vdtrain.diffusion.contexts import MIXINGS
from vdtrain.errors import ConfigError
from vdtrain.media import read_images

Values = Mapping[Component, Any]
# Levels of focus that the tab of disentanglement goes through.
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
FOCUS = "0 content, 1 style"
MULTIPLE_IMAGES, MULTIPLE_TEXTS = 4, 2
# Height and width of an image that a mask is painted on.
PAINTED_PIXELS = 512


@dataclass(frozen=True)
class Form:
    """The inputs of a tab, made where they stand in the page.

    Attributes:
        command: sample, blend or edit.
        inputs: components that a person fills in.
        parts: from their values and the folder of the results, the settings of each run of the command.
        outputs: modalities of the results.
        counted: setting that takes the number of results; None if there is one result.
        choice: component whose value is the modality of the results, of several.
        masks: editors of masks, each with the image that it stands on.
    """

    command: str
    inputs: list[Component]
    parts: Callable[[Values, Path], list[Settings]]
    outputs: tuple[str, ...]
    counted: str | None = None
    choice: Any = None
    masks: tuple[tuple[Any, Any], ...] = ()


@dataclass(frozen=True)
class Tab:
    """A tab of the page.

    Attributes:
        about: what it does, in a line.
        flows: that it needs; of a blend, those of its contexts and any output.
        form: makes the inputs, from the modalities that the model makes.
    """

    name: str
    about: str
    flows: tuple[str, ...]
    form: Callable[[list[str]], Form]


def _filled(values: Values, component: Component, what: str) -> Any:
    """The value of a component.

    Raises:
        ConfigError: it has none.
    """
    value = values[component]
    if value is None or (isinstance(value, str) and not value.strip()):
        label = str(component.label)
        raise ConfigError(f"{label[:1].lower()}{label[1:]}: empty; {what}")
    return value


def _text(flow: str, outputs: list[str]) -> Form:
    prompt = gr.Textbox(label="Prompt", lines=3, placeholder="a red circle on white", autofocus=True)
    return _sample(flow, prompt, "write a text")


def _image(flow: str, outputs: list[str]) -> Form:
    return _sample(flow, image_file(), "give an image file")


def _sample(flow: str, given: Component, what: str) -> Form:
    def parts(values: Values, folder: Path) -> list[Settings]:
        return [{"flow": flow, "inputs": [_filled(values, given, what)]}]

    return Form("sample", [given], parts, (flow.rpartition("-")[2],), counted="samples_per_input")


def _disentanglement(outputs: list[str]) -> Form:
    image = image_file()
    focus = gr.Slider(0, 1, value=0.0, step=0.05, label="Focus", info=FOCUS)
    all_levels = gr.Checkbox(label=f"Five images instead: focus {', '.join(f'{level:g}' for level in LEVELS)}")

    def parts(values: Values, folder: Path) -> list[Settings]:
        file = _filled(values, image, "give an image file")
        levels = LEVELS if values[all_levels] else (float(values[focus]),)
        return [{"flow": "image-to-image", "inputs": [file], "focus": level} for level in levels]

    return Form("sample", [image, focus, all_levels], parts, ("image",), counted="samples_per_input")


def _blend(images: int, texts: int, outputs: list[str]) -> Form:
    slots: list[tuple[str, Component, Component, Component | None, Component | None]] = []
    alone = texts == 1 and images == 1
    for number in range(1, texts + 1):
        with gr.Group():
            text = gr.Textbox(label="Text" if alone else f"Text {number}", lines=1)
            slots.append(("text", text, _weight(), None, None))
    for number in range(1, images + 1):
        name = "Image" if alone else f"Image {number}"
        with gr.Accordion(name, open=number <= 1):
            with gr.Row():
                image = image_file(220)
                with gr.Column(min_width=160):
                    weight = _weight()
                    focus = gr.Slider(0, 1, value=0.5, step=0.05, label="Focus", info=FOCUS)
            with gr.Accordion("Mask: paint over what shall be hidden", open=False):
                mask = mask_editor()
        slots.append(("image", image, weight, focus, mask))
    output = gr.Radio(outputs, value=outputs[0], label="Result", visible=len(outputs) > 1)
    with gr.Accordion("How they are mixed", open=False):
        mixing = gr.Radio(list(MIXINGS), value=MIXINGS[0], label="Mixing", info="in each layer, or a layer for each")
        join = gr.Checkbox(True, label="Join inputs of one kind, token after token")

    def parts(values: Values, folder: Path) -> list[Settings]:
        contexts = []
        for number, (modality, given, weight, focus, mask) in enumerate(slots):
            if not (values[given] or "").strip():
                continue
            context = {modality: values[given], "weight": _filled(values, weight, "give a number")}
            if focus is not None and values[focus] != 0.5:
                context["focus"] = float(values[focus])
            if mask is not None and (file := write_mask(values[mask], folder / f"mask-{number}.png")):
                context["mask"] = str(file.absolute())
            contexts.append(context)
        if not contexts:
            raise ConfigError("texts, images: all empty; give at least one")
        return [{"output": values[output], "contexts": contexts, "mixing": values[mixing], "join": values[join]}]

    inputs = [each for _, *slot in slots for each in slot if each is not None]
    masks = tuple((given, mask) for _, given, _, _, mask in slots if mask is not None)
    return Form("blend", [*inputs, output, mixing, join], parts, tuple(outputs), "samples", output, masks)


def _weight() -> Component:
    return gr.Slider(0, 1, value=0.5, step=0.05, label="Weight", min_width=120)


def _edit(outputs: list[str]) -> Form:
    image = image_file()
    with gr.Row():
        remove = gr.Textbox(label="Remove", placeholder="a circle", min_width=120)
        add = gr.Textbox(label="Add", placeholder="a blue star", min_width=120)
    with gr.Accordion("How strongly", open=False):
        share = gr.Slider(0.01, 0.99, value=0.67, step=0.01, label="Share of the text", info="the style has the rest")
        rank = gr.Number(10, precision=0, minimum=1, label="Components that count as style")

    def parts(values: Values, folder: Path) -> list[Settings]:
        return [
            {
                "inputs": [_filled(values, image, "give an image file")],
                "remove": values[remove] or "",
                "add": values[add] or "",
                "text_share": float(values[share]),
                "style_rank": _filled(values, rank, "give a number"),
            }
        ]

    return Form("edit", [image, remove, add, share, rank], parts, ("image", "text"))


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


TEXTS, IMAGES = ("text-to-image", "text-to-text"), ("image-to-image", "image-to-text")
TABS = (
    Tab("Text to image", "Images from words.", TEXTS[:1], partial(_text, TEXTS[0])),
    Tab("Image variation", "Other images like one.", IMAGES[:1], partial(_image, IMAGES[0])),
    Tab("Image to text", "Captions of an image.", IMAGES[1:], partial(_image, IMAGES[1])),
    Tab("Text variation", "Other words for a text.", TEXTS[1:], partial(_text, TEXTS[1])),
    Tab("Disentanglement", "The content of an image in other styles, or its style with other content.", IMAGES[:1],
        _disentanglement),
    Tab("Dual context", "A text and an image at once.", ("text-to-", "image-to-"), partial(_blend, 1, 1)),
    Tab("Multi-context", "Several texts and images at once. Those left empty do not count.", ("image-to-",),
        partial(_blend, MULTIPLE_IMAGES, MULTIPLE_TEXTS)),
    Tab("Editing", "Words taken out of an image, and others put in.", (*IMAGES, TEXTS[0]), _edit),
)  # fmt: skip
