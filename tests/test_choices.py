"""Figures that docs/choices.md quotes are those of the results that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from vdtrain.config.compose import compose, options, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import phase_steps
from vdtrain.diffusion.schedule import Schedule
from vdtrain.engine.engine import kept_share

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


def left(first: int, last: int, decay: float | None = None) -> float:
    """Share of an average before update `first` that is in it after update `last`."""
    config = to_object(compose("train", []), TrainConfig)
    return float(kept_share(torch.arange(first, last + 1, dtype=torch.float64), config.ema.length, decay).prod())


def test_figures_of_averaged_weights() -> None:
    """At the default settings of every stage."""
    text = (ROOT / "docs" / "choices.md").read_text()
    for number, stage in enumerate((each for each in options("stage") if each.startswith("stage")), start=1):
        config = to_object(compose("train", [f"stage={stage}"]), TrainConfig)
        low, high = (phase_steps(config, phase) for phase in config.stage.phases)
        fixed, lasting = 0.9999**high, left(low + 1, low + high)
        assert f"| {number} | {low:,} | {high:,} | {fixed:.1%} | {lasting:.1%} | 0 |".replace("%", " %") in text
        # The usual warm-up never came to its limit.
        assert left(low + 1, low + high, decay=0.9999) == lasting
        assert left(1, high) < 1e-20
    keep = kept_share(torch.arange(1, 100_000, dtype=torch.float64), 0.1)
    assert f"it comes to 0.9999 at update {int((keep < 0.9999).sum()) + 1:,}." in text


def test_the_age_of_what_is_in_an_average() -> None:
    text, count = (ROOT / "docs" / "choices.md").read_text(), 12_500
    for length in (0.1, 0.05, 0.3):
        keep = kept_share(torch.arange(1, count + 1, dtype=torch.float64), length)
        later = torch.cat([keep[1:], torch.ones(1, dtype=torch.float64)]).flip(0).cumprod(0).flip(0)
        weights = (1 - keep) * later
        ages = count - torch.arange(1, count + 1)
        assert float((weights * ages).sum()) / count == pytest.approx(length, rel=0.01)
        if length == 0.1:
            assert f"fifth makes up {float(weights[-count // 5 :].sum()):.0%}".replace("%", " %") in text


def test_figures_of_the_noise_schedules() -> None:
    text = " ".join((ROOT / "docs" / "choices.md").read_text().split())
    found = []
    for name in ("released", "paper"):
        config = to_object(compose("train", [f"model.schedule={name}"]), TrainConfig)
        found.append(f"{float(Schedule(config.model.schedule).alphas_cumprod[-1]):.2%}".replace("%", " %"))
    assert f"{found[0]} of the signal's variance is left under the one, {found[1]} under the other" in text
