"""Figures that docs/choices.md quotes are those of the results that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_measured_gradient_scales() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "gradient_scales.json").read_text())
    text = (ROOT / "docs" / "choices.md").read_text()
    table = re.search(r"\| factor of 0\.1 for data\.image on \|.*?\n\n", text, flags=re.DOTALL)
    assert table is not None
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].strip().splitlines()]
    assert (result["scaled_group"], result["scale"]) == ("data.image", 0.1)
    assert len(rows) == len(result["ratios"])
    # In the order of the file, and to two digits.
    for row, ratios in zip(rows, result["ratios"].values(), strict=True):
        assert {group: f"{ratios[group]:.2f}" for group in head[1:]} == dict(zip(head[1:], row[1:], strict=True))
    steps = re.search(r"after (\d+ steps)", result["what"])
    assert steps is not None
    assert f"({steps[1]} of" in text
