"""The pictures of docs/report.md, taken in Chromium.

python -m tests.report.pictures RUN_DIR A B      a curriculum's last run, and two folders of samples to compare
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser import chromium
from vdtrain.cli import main as vdtrain_main

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main(run: str, a: str, b: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        report, comparison = folder / "report.html", folder / "comparison.html"
        assert vdtrain_main(["report", run, f"output={report}"]) == 0
        assert vdtrain_main(["compare", a, b, f"output={comparison}"]) == 0
        with chromium(folder) as page:
            page.open(report.as_uri(), 1280, 1060)
            page.run("document.querySelector('.chart svg').focus()")
            page.press("End")
            for _ in range(3):
                page.press("PageUp")
            page.screenshot(folder / "report.png")
            page.run("document.getElementById('films-title').scrollIntoView()")
            page.screenshot(folder / "report_samples.png")
            page.open(comparison.as_uri(), 1100, 860)
            page.press("ArrowLeft")
            page.press("ArrowRight")
            page.screenshot(folder / "comparison.png")
        for file in folder.glob("*.png"):
            with Image.open(file) as shot:
                shot.quantize(192, dither=Image.Dither.NONE).save(IMAGES / file.name, optimize=True)
            print(IMAGES / file.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
