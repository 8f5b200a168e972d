"""Figures of select and index in docs/budget.md are those of their benchmarks, and the sums follow from the rates."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "budget.md").read_text()
INDEX = json.loads((ROOT / "benchmarks" / "results" / "index.json").read_text())["contestants"]["index"]
INDEX_RATE = INDEX["samples_per_core_second"]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "select_rows.json").read_text())


def row(name: str) -> list[float]:
    """The numbers of a row of the first table."""
    line = next(line for line in PAGE.splitlines() if line.startswith("|") and name in line.split("|")[1])
    return [float(re.search(r"[\d.]+", cell.replace(",", ""))[0]) for cell in line.split("|")[2:5]]  # type: ignore[index]


def test_rates_of_select() -> None:
    rate, hours = RESULT["select"]["rows_per_cpu_second"], RESULT["cpu_hours_for_2.7e9_rows"]
    assert f"| select | {round(rate, -3):,} rows per second and core, {hours:.1f} core-hours" in PAGE
    assert f"{RESULT['select']['peak_megabytes']} MB for two processes together" in PAGE
    assert RESULT["processes"] == 2
    assert RESULT["rows"] == 10_000_000
    assert f"{RESULT['metadata_bytes_per_row']:.0f} bytes" in PAGE
    assert f"{RESULT['selected_bytes_per_row_kept']:.0f} bytes for a row in the parts" in PAGE
    minutes = RESULT["cpu_hours_for_2.7e9_rows"] * 60 / 16
    assert row("select")[0] == pytest.approx(minutes, rel=0.1)


def test_sums() -> None:
    urls = [number * 1e6 for number in row("URLs to fetch")]
    assert urls[1] == pytest.approx(2.7e9 * RESULT["rows_kept"] / RESULT["rows"], rel=0.01)
    images = [number * 1e6 for number in row("images that come")]
    for number in range(3):
        assert images[number] == pytest.approx(0.6 * urls[number], rel=0.02)
        hours = urls[number] / 60 / 16 / 3600
        assert row("machines of 16 cores")[number] == pytest.approx(hours, rel=0.03)
        assert row("machines for the download")[number] == pytest.approx(0.7 * hours, rel=0.05)
        assert row("network")[number] == pytest.approx(images[number] * 96e-9, rel=0.03)
        terabytes = images[number] * 68e-9
        assert row("shards")[number] == pytest.approx(terabytes, rel=0.03)
        assert row("a month")[number] == pytest.approx(terabytes * 23, rel=0.03)
        assert row("moving them")[number] == pytest.approx(terabytes * 90, rel=0.03)
        assert row("index")[number] == pytest.approx(images[number] / INDEX_RATE / 3600, rel=0.03)
        assert row("stream")[number] == pytest.approx((30e6 / 1000 + 6.4e6 / 770) / 3600, rel=0.05)
