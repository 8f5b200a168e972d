"""Votes of a blind comparison: read, added up over raters, and judged. Needs the extra `evaluation`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from vdtrain.errors import ConfigError, unreadable
from vdtrain.files import SHAPE_ERRORS, read_json
from vdtrain.report.comparison import FORMAT, Comparison

CHOICES = ("left", "right", "equal")


A, B, EQUAL = "a", "b", "equal"


CONFIDENCE, LEVEL = 0.95, 0.05


@dataclass(frozen=True)
class Share:
    """Votes for one answer, and their share of all votes with its 95 % interval (Wilson 1927)."""

    votes: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, votes: int, total: int) -> Share:
        interval = binomtest(votes, total).proportion_ci(CONFIDENCE, method="wilson")
        return cls(votes, votes / total, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class Result:
    """The answer for a task, or for all together.

    Attributes:
        shares: of the votes, for "a", "b" and "equal".
        pairs_a, pairs_b: pairs that more votes give to that side. The rest are even.
        p_value: of the exact, two-sided sign test over these pairs: how often equals would differ as much.
    """

    task: str
    votes: int
    shares: dict[str, Share]
    pairs_a: int
    pairs_b: int
    p_value: float

    @property
    def significant(self) -> bool:
        return self.p_value < LEVEL


def read_votes(files: Sequence[Path], comparison: Comparison) -> dict[str, dict[int, str]]:
    """For each rater: pair -> "a", "b" or "equal". Of several files of one rater the one with most votes counts.

    Raises:
        ConfigError: a file that cannot be read, or that holds votes on another comparison.
    """
    raters: dict[str, dict[int, str]] = {}
    for path in files:
        try:
            content = read_json(path)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            rater, same = str(content["rater"]), content["comparison"] == comparison.identity
            votes = {each["pair"]: each["choice"] for each in content["votes"]}
        except OSError as error:
            raise ConfigError(f"votes={path}: {unreadable(error, path)}") from error
        except SHAPE_ERRORS as error:
            raise ConfigError(
                f"votes={path}: holds no votes; give a file that the page of vdtrain compare saved"
            ) from error
        if not same:
            raise ConfigError(
                f"votes={path}: is of another comparison; give the folders in the order, and pairs and seed with the "
                "values, that its page was made with"
            )
        known = {pair.number: pair for pair in comparison.pairs}
        if not all(type(number) is int and number in known and choice in CHOICES for number, choice in votes.items()):
            raise ConfigError(f"votes={path}: holds a vote on no pair of this comparison; download it again")
        if len(votes) > len(raters.get(rater, {})):
            raters[rater] = {number: known[number].meant(choice) for number, choice in votes.items()}
    return raters


def results(comparison: Comparison, raters: Mapping[str, Mapping[int, str]]) -> list[Result]:
    """One result for each task that has votes; of several tasks also one for all together, which comes last."""
    tasks = dict.fromkeys(pair.task for pair in comparison.pairs)
    groups = {task: {pair.number for pair in comparison.pairs if pair.task == task} for task in tasks}
    if len(tasks) > 1:
        groups["all"] = {pair.number for pair in comparison.pairs}
    found = (_result(task, numbers, raters) for task, numbers in groups.items())
    return [result for result in found if result is not None]


def _result(task: str, numbers: set[int], raters: Mapping[str, Mapping[int, str]]) -> Result | None:
    votes = [(number, answer) for own in raters.values() for number, answer in own.items() if number in numbers]
    if not votes:
        return None
    counts = Counter(answer for _, answer in votes)
    balance: Counter[int] = Counter()
    for number, answer in votes:
        balance[number] += (answer == A) - (answer == B)
    # Several votes on one pair are not independent, so that the test counts every pair once.
    more_a, more_b = (sum(sign * value > 0 for value in balance.values()) for sign in (1, -1))
    p_value = float(binomtest(more_a, more_a + more_b).pvalue) if more_a + more_b else 1.0
    shares = {answer: Share.of(counts[answer], len(votes)) for answer in (A, B, EQUAL)}
    return Result(task, len(votes), shares, more_a, more_b, p_value)


def print_results(found: Sequence[Result], raters: int, a: str, b: str) -> None:
    """Print a row for each task: the shares of both folders, and whether they differ."""
    table = Table(
        title=f"{raters} rater{'s' * (raters != 1)}; 95 % confidence intervals (Wilson)", title_justify="left"
    )
    for heading in ("task", "votes", "A better", "B better", "equal", "pairs A : B", "p (sign test)"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for result in found:
        shares = (f"{each.share:.0%} ({each.low:.0%} to {each.high:.0%})" for each in result.shares.values())
        pairs = f"{result.pairs_a} : {result.pairs_b}"
        table.add_row(result.task or "samples", str(result.votes), *shares, pairs, f"{result.p_value:.2g}")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"A: {a}\nB: {b}", markup=False)
    console.print(table)
    for result in found:
        preferred = "no significant preference"
        if result.significant:
            preferred = f"{'A' if result.pairs_a > result.pairs_b else 'B'} is preferred"
        console.print(f"{result.task or 'samples'}: {preferred} (p = {result.p_value:.2g})", markup=False)
