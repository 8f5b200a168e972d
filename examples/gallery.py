"""The images of docs/gallery.md, from the results of examples/gallery.sh: one strip per task, inputs before results.

python examples/gallery.py demo/gallery docs/images/gallery
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

CIRCLE, STAR, SQUARE, MASK = (
    str(Path(__file__).parent / "images" / f"{name}.png") for name in ("circle", "star", "square", "lower-half")
)
# By strip: cells of a label and an image file, a file of captions, or a text in quotation marks.
STRIPS: dict[str, list[tuple[str, str]]] = {
    "text-to-image": [
        ("“a red circle on\na white background”", "text-to-image/0000.png"),
        ("“a blue star on\na black background”", "text-to-image/0001.png"),
        ("“a green square on\na white background”", "text-to-image/0002.png"),
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
        ("seen through", MASK),
        ("and", SQUARE),
        ("and", "“a picture on a\nblack background”"),
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
# The picture of README.md: what a task is given, above what it makes.
OVERVIEW: list[tuple[str, str, str]] = [
    ("text-to-image", "“a red circle on\na white background”", "text-to-image/0000.png"),
    ("image variation", STAR, "image-variation/0001.png"),
    ("image-to-text", STAR, "image-to-text/captions.txt"),
    ("text variation", "“a large red circle”", "text-variation/captions.txt"),
    ("blending with\n“a yellow square”", STAR, "dual-context/1/0000.png"),
    ("editing: less a star,\nplus a circle", STAR, "edit/0/0000.png"),
]


def fill(cell: Axes, content: str, source: Path, lines: int | None = None) -> None:
    """Show an image file, the first lines of a file of captions, or a text."""
    cell.set(xticks=[], yticks=[])
    cell.set_box_aspect(1)
    if content.endswith(".png"):
        with Image.open(source / content) as image:
            cell.imshow(image.convert("RGB"))
        return
    captions = content.endswith(".txt")
    text = "\n".join((source / content).read_text().splitlines()[:lines]) if captions else content
    left = captions and lines is None
    text = text if left or not captions else "\n".join(textwrap.wrap(text, 18))
    cell.text(0.0 if left else 0.5, 0.5, text, ha="left" if left else "center", va="center", fontsize=8)
    cell.set_frame_on(lines is not None)


def draw(name: str, cells: list[tuple[str, str]], source: Path, target: Path) -> None:
    """One strip as a PNG file."""
    figure, axes = plt.subplots(1, len(cells), figsize=(1.35 * len(cells), 1.7), squeeze=False)
    for cell, (label, content) in zip(axes[0], cells, strict=True):
        cell.set_title(label, fontsize=7)
        fill(cell, content, source)
    figure.savefig(target / f"{name}.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_overview(source: Path, target: Path) -> None:
    """What each task is given, and what it makes, as a PNG file."""
    figure, axes = plt.subplots(2, len(OVERVIEW), figsize=(1.5 * len(OVERVIEW), 3.4))
    for column, (title, given, made) in enumerate(OVERVIEW):
        axes[0][column].set_title(title, fontsize=8)
        for row, content in enumerate((given, made)):
            fill(axes[row][column], content, source, lines=1)
    for row, label in enumerate(("given", "made")):
        axes[row][0].set_ylabel(label, fontsize=8)
    for cell in axes.flat:
        cell.spines[:].set_color("#cccccc")
    figure.tight_layout(h_pad=0.4, w_pad=0.4)
    figure.savefig(target / "overview.png", dpi=130)
    plt.close(figure)


def main(source: str, target: str) -> None:
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    for name, cells in STRIPS.items():
        draw(name, cells, Path(source), folder)
    draw_overview(Path(source), folder)
    print("\n".join(map(str, sorted(folder.glob("*.png")))))


if __name__ == "__main__":
    main(*sys.argv[1:])
