"""The curves of a report: every number of a run's records, in groups, with a bounded number of points."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# What the axis and the marks show, and no curve does.
AXES = ("step", "samples", "total_samples", "time", "phase", "resolution")
# Points of a curve over the whole curriculum, and the fewest of a run; curves of a page.
POINTS, LEAST_POINTS, SERIES = 600, 40, 400
DIGITS = 5
Record = Mapping[str, Any]


@dataclass(frozen=True)
class About:
    """Where a group of numbers is shown, and how.

    Attributes:
        smooth: whether its curves are smoothed.
    """

    section: str
    title: str
    unit: str = ""
    smooth: bool = True


# Sections in their order, each with its title and a line about it.
SECTIONS = {
    "losses": ("Losses", "Mean over the steps between two lines of the log, one curve for each flow."),
    "validation": ("Validation", "Held-out pairs, with the same noise at every moment."),
    "rates": ("Rates and gradients", ""),
    "speed": ("Speed", ""),
    "trouble": ("Trouble", "Counted since the start of the stage."),
    "other": ("Other figures", ""),
}
LEAST = "of the timesteps; 1 has the least noise"
# By the name of a number, or of the table that it stands in.
KNOWN = {
    "loss": About("losses", "Training loss", "mean squared error"),
    "loss_quarters": About("losses", "Loss by quarter", LEAST),
    "validation": About("validation", "Validation loss", "mean squared error", smooth=False),
    "validation_scores": About("validation", "Samples from held-out pairs", smooth=False),
    "validation_quarters": About("validation", "Validation by quarter", LEAST, smooth=False),
    "validation_seconds": About("validation", "Time of a validation", "s", smooth=False),
    "gradient_norm": About("rates", "Gradient norm", "before clipping"),
    "update_ratios": About("rates", "Update to weights", "ratio of norms"),
    "learning_rate": About("rates", "Learning rate", smooth=False),
    "pairs_per_second": About("speed", "Speed", "pairs/s"),
    "data_wait": About("speed", "Waiting for data", "share of the time"),
    "time_shares": About("speed", "Parts of a step", "share of the time"),
    "tflops": About("speed", "Computation", "TFLOP/s of a process"),
    "peak_share": About("speed", "Computation", "share of the peak"),
    "memory_gb": About("speed", "Peak memory", "GB of a process"),
    "step_times": About("speed", "Step of the slowest and fastest process", "s"),
    "slowest_rank": About("speed", "Number of the slowest process", smooth=False),
    "save_times": About("speed", "Saving", "s", smooth=False),
    "skipped": About("trouble", "Skipped steps", smooth=False),
    "replaced": About("trouble", "Bad samples replaced", smooth=False),
    "failed_saves": About("trouble", "Failed saves", smooth=False),
}
# Names of numbers, each with its chart and its curve there; of other tables, each is a chart.
PLACES = (
    (r"validation/([\w-]+)/(model|ema)", r"validation/\2", r"\1"),
    (r"validation_scores/([\w-]+)/(\w+)", r"validation_scores/\2", r"\1"),
    (r"(loss|validation)_quarters/(.+)/q?(\d)", r"\1_quarters/\2", r"quarter \3"),
    (r"(learning_rate|gradient_norm)s/(.+)", r"\1", r"\2"),
    (r"(learning_rate)", r"\1", "base"),
    (r"(gradient_norm)", r"\1", "all layers"),
    (r"(.+)/([^/]+)", r"\1", r"\2"),
    (r"(.+)", r"\1", r"\1"),
)
WORDS = {
    "ema": "averaged weights",
    "model": "weights as trained",
    "clip_score": "CLIP score",
    "clip_distance": "CLIP distance",
    "fid": "FID",
}


def sections(runs: Sequence[tuple[int, Sequence[Record]]]) -> tuple[list[dict[str, Any]], list[list[float]], list[str]]:
    """What the page's script draws: sections of charts of curves; the axes that curves share; remarks.

    Args:
        runs: for every run, the samples of the curriculum before it, and its records.
    """
    axes: dict[tuple[float, ...], int] = {}
    groups: dict[str, dict[str, list[Any]]] = {}
    total, remarks = sum(len(records) for _, records in runs) or 1, []
    for begin, records in runs:
        points = max(LEAST_POINTS, POINTS * len(records) // total)
        found = _series(begin, records)
        if len(found) > SERIES:
            remarks.append(f"{len(found) - SERIES:,} of {len(found):,} kinds of figures are left out.")
        for name, series in list(found.items())[:SERIES]:
            group, curve = _place(name)
            xs, *values = downsampled(series, points)
            number = axes.setdefault(tuple(xs), len(axes))
            parts = groups.setdefault(group, {}).setdefault(curve, [])
            parts.append([number, *values])
    counted = [group for group in groups if _about(group).section == "trouble"]
    quiet = [group for group in counted if not any(any(part[1]) for parts in groups[group].values() for part in parts)]
    if quiet:
        remarks.append(f"None of these happened: {', '.join(_about(group).title.lower() for group in quiet)}.")
    made = []
    for section, (title, text) in SECTIONS.items():
        charts = [
            _chart(_about(group), curves)
            for group, curves in sorted(groups.items(), key=lambda each: _rank(each[0]))
            if _about(group).section == section and group not in quiet
        ]
        if charts:
            made.append({"id": section, "title": title, "text": text, "charts": charts})
    return made, [list(xs) for xs in axes], remarks


def downsampled(
    series: Sequence[array[float]], points: int
) -> tuple[list[float], list[float], list[float] | None, list[float] | None]:
    """Positions and values of at most `points` points; of more values each point is a mean, with the least and most."""
    xs, ys = map(np.asarray, series)
    if len(xs) <= points:
        return _rounded(xs, 12), _rounded(ys), None, None
    starts = np.arange(points) * len(xs) // points
    counts = np.diff([*starts, len(xs)])
    means = [np.add.reduceat(values, starts) / counts for values in (xs, ys)]
    low, high = np.minimum.reduceat(ys, starts), np.maximum.reduceat(ys, starts)
    return _rounded(np.round(means[0]), 12), _rounded(means[1]), _rounded(low), _rounded(high)


def _series(begin: int, records: Sequence[Record]) -> dict[str, tuple[array[float], array[float]]]:
    """Every number over a run: samples of the whole curriculum, and its values there."""
    found: dict[str, tuple[array[float], array[float]]] = {}
    for record in records:
        x = begin + record.get("samples", record["step"])
        for name, value in numbers(record):
            xs, ys = found.setdefault(name, (array("d"), array("d")))
            xs.append(x)
            ys.append(value)
    return found


def numbers(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    """All finite numbers of a record by their name; "loss/text-to-image" for one in a table."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and (prefix or key not in AXES):
            number = float(value) if abs(value) < 1e300 else math.inf
            if math.isfinite(number):
                yield f"{prefix}{key}", number


def _place(name: str) -> tuple[str, str]:
    """The chart and the curve of a number."""
    for form, chart, curve in PLACES:
        if match := re.fullmatch(form, name):
            return match.expand(chart), match.expand(curve)
    return name, name


def _about(group: str) -> About:
    first, *rest = group.split("/")
    known = KNOWN.get(first) or About("other", first.replace("_", " "))
    return replace(known, title=", ".join([known.title, *(WORDS.get(each, each) for each in rest)]))


def _rank(group: str) -> tuple[int, str]:
    """Known groups come first, each before those below its name."""
    names = list(KNOWN)
    first = group.partition("/")[0]
    return names.index(first) if first in names else len(names), group


def _chart(about: About, curves: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    series = [{"name": name, "parts": parts} for name, parts in curves.items()]
    return {"title": about.title, "unit": about.unit, "smooth": about.smooth, "series": series}


def _rounded(values: Any, digits: int = DIGITS) -> list[float]:
    """Short decimals: the page holds many of them."""
    short = (float(f"{value:.{digits}g}") for value in values)
    return [int(value) if value.is_integer() else value for value in short]
