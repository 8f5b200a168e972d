"""The tables of the training step on the pages are those of its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import train_step

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return train_step.tables(json.loads(train_step.RESULT.read_text())).splitlines()


def test_the_page_of_benchmarks_has_every_row(lines: list[str]) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    assert [line for line in lines if line and line not in page] == []


def test_the_readme_has_rows_of_it(lines: list[str]) -> None:
    readme = (ROOT / "README.md").read_text().splitlines()
    own = [line for line in readme if line.startswith(("| vdtrain", "| diffusers'", "| the same, fused"))]
    assert len(own) >= 4
    assert set(own) <= set(lines)
