"""The images of docs/gallery.md, from the results of examples/gallery.sh: one strip per task, inputs before results.

python examples/gallery.py demo/gallery docs/images/gallery
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

CIRCLE, STAR, SQUARE = (f"text-to-image/{index:04d}.png" for index in range(3))
# By strip: cells of a label and an image file, a file of captions, or a text in quotation marks.
STRIPS: dict[str, list[tuple[str, str]]] = {
    "text-to-image": [
        ("“a red circle on\na white background”", CIRCLE),
        ("“a blue star on\na black background”", STAR),
        ("“a green square on\na white background”", SQUARE),
    ],
    "image-variation": [("given", STAR), *(("", f"image-variation/{index:04d}.png") for index in range(4))],
    "image-to-text": [("given", STAR), ("", "image-to-text/captions.txt")],
    "text-variation": [("given", "“a large red circle”"), ("", "text-variation/captions.txt")],
    "dual-context": [
        ("“a yellow square”\nand", STAR),
        *((f"{weight} : 1", f"dual-context/{weight}/0000.png") for weight in ("0.1", "0.5", "1", "2", "10")),
    ],
    "multi-context": [
        ("", CIRCLE),
        ("seen through", "lower-half.png"),
        ("and", SQUARE),
        ("and", "“an image on a\nblack background”"),
        *(("", f"multi-context/{index:04d}.png") for index in range(4)),
    ],
    "focus": [
        ("given", CIRCLE),
        *((f"focus {level}", f"focus/{level}/0000.png") for level in ("0", "0.3", "0.4", "0.5", "1")),
    ],
    "image-to-image": [
        ("“a yellow square”\nfrom", STAR),
        *((f"fidelity {level}", f"image-to-image/{level}/0000.png") for level in ("0.1", "0.3", "0.5", "0.7", "0.8")),
    ],
    "edit": [
        ("given", STAR),
        ("less a star,\nplus a circle", "edit/0/0000.png"),
        ("less blue,\nplus green", "edit/1/0000.png"),
        ("given", CIRCLE),
        ("less a circle,\nplus a triangle", "edit/2/0000.png"),
    ],
}


def draw(name: str, cells: list[tuple[str, str]], source: Path, target: Path) -> None:
    """One strip as a PNG file."""
    figure, axes = plt.subplots(1, len(cells), figsize=(1.35 * len(cells), 1.7), squeeze=False)
    for cell, (label, content) in zip(axes[0], cells, strict=True):
        cell.set(xticks=[], yticks=[])
        cell.set_box_aspect(1)
        cell.set_title(label, fontsize=7)
        if content.endswith(".png"):
            with Image.open(source / content) as image:
                cell.imshow(image.convert("RGB"))
            continue
        text = (source / content).read_text() if content.endswith(".txt") else content
        left = content.endswith(".txt")
        cell.text(0.0 if left else 0.5, 0.5, text, ha="left" if left else "center", va="center", fontsize=8)
        cell.set_frame_on(False)
    figure.savefig(target / f"{name}.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(source: str, target: str) -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    for name, cells in STRIPS.items():
        draw(name, cells, Path(source), Path(target))
        print(Path(target) / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
