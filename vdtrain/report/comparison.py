"""A blind comparison of two folders of samples, and its votes: read, added up over raters, and judged.

A seed draws the order of the pairs and their sides.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from vdtrain.data.decode import IMAGE_ERRORS
from vdtrain.errors import ConfigError, one_line, unreadable
from vdtrain.files import SHAPE_ERRORS, FileRecord, read_json, read_record
from vdtrain.media import CAPTIONS_FILE, FIRST, NUMBERED_CAPTIONS
from vdtrain.report.page import IMAGE_SUFFIXES, embedded, write_page

FORMAT = "vdtrain votes 1"
FLOW = re.compile(r"[a-z]+-to-[a-z]+")
PROMPTS_FILE = "prompts.jsonl"
# Folders below an evaluation's: real images, and parts; and the one that is not named after a task.
NO_SAMPLES, NAMELESS = ("real", "parts"), ("images",)
# Of an image on the page: longer side in pixels, and a quality that leaves no marks of its own.
SIDE, QUALITY = 768, 92


@dataclass(frozen=True)
class Sample:
    """One result.

    Attributes:
        task: the flow that made it; empty if that is not known.
        name: of its file, or the number of its line.
        given: the caption, or the name of the image, that it was made from; None if that is not known.
        content: an image file, or a caption.
        source: the image that it was made from, if its folder has it.
    """

    task: str
    name: str
    given: str | None
    content: str | Path
    source: Path | None = None

    @property
    def identity(self) -> str:
        """A hash of its content."""
        if isinstance(self.content, Path):
            return FileRecord.of(self.content).sha256
        return hashlib.sha256(self.content.encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class Pair:
    """Two samples of one task from the same input; on the page `b` is on the left if they are swapped."""

    number: int
    task: str
    a: Sample
    b: Sample
    swapped: bool

    def meant(self, choice: str) -> str:
        """The answer "a", "b" or "equal" that a choice of "left", "right" or "equal" stands for."""
        return choice if choice == "equal" else "b" if (choice == "left") == self.swapped else "a"

    def shown(self, inputs: Path) -> dict[str, Any]:
        """What the page shows; it tells neither names of files nor which side is which."""
        left, right = (self.b, self.a) if self.swapped else (self.a, self.b)
        text = self.a.given if self.a.given is not None else self.b.given
        given: str | Path | None = text
        if self.task.startswith("image-"):
            named = [inputs / text] if text is not None else []
            sources = [each for each in (self.a.source, self.b.source, *named) if each is not None and each.is_file()]
            given = next(iter(sources), None)
        return {
            "number": self.number,
            "task": self.task,
            "given": None if given is None else _shown(given),
            "left": _shown(left.content),
            "right": _shown(right.content),
        }


@dataclass(frozen=True)
class Comparison:
    """Pairs in the order of the page.

    Attributes:
        identity: a hash of all pairs, their order and sides, which votes name.
        unmatched: samples of each folder without a partner in the other.
    """

    pairs: list[Pair]
    identity: str
    unmatched: tuple[int, int]


def make_comparison(a: Path, b: Path, most: int | None, seed: int) -> Comparison:
    """Match the samples of two folders, draw at most `most` of the pairs, and draw their order and sides.

    Samples of a task match by their inputs if all of these are known, the first of an input with the first and so on;
    else by their names. Half of each task's pairs are swapped.

    Raises:
        ConfigError: no samples, or none that match.
    """
    sides = [read_samples(folder, f"{name}={folder}") for name, folder in (("a", a), ("b", b))]
    tasks = [{sample.task for sample in side} for side in sides]
    for own, other in ((0, 1), (1, 0)):
        if tasks[own] == {""} and len(tasks[other]) == 1:
            sides[own] = [replace(sample, task=next(iter(tasks[other]))) for sample in sides[own]]
    named = {sample.task for side in sides for sample in side if sample.given is None}
    first, second = (dict(_keyed(side, named)) for side in sides)
    common = {key: (sample, second[key]) for key, sample in first.items() if key in second}
    if not common:
        raise ConfigError(f"b={b}: no sample has task and input of one in a={a}; compare samples from the same inputs")
    hashes = {key: [sample.identity for sample in pair] for key, pair in common.items()}

    def draw(kind: str, keys: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Keys in a random order, the same for the same seed and samples on every machine."""
        drawn = {key: json.dumps([seed, kind, *key, *hashes[key]]).encode() for key in keys}
        return sorted(keys, key=lambda key: hashlib.sha256(drawn[key]).digest())

    chosen = draw("order", list(common))[:most]
    counts: Counter[str] = Counter()
    swapped = {}
    for key in draw("side", chosen):
        counts[key[0]] += 1
        swapped[key] = counts[key[0]] % 2 == 0
    pairs = [Pair(number, key[0], *common[key], swapped[key]) for number, key in enumerate(chosen, start=1)]
    identity = json.dumps([[*key, *hashes[key], swapped[key]] for key in chosen]).encode()
    unmatched = (len(first) - len(common), len(second) - len(common))
    return Comparison(pairs, hashlib.sha256(identity).hexdigest()[:24], unmatched)


def write_comparison(comparison: Comparison, output: Path, inputs: Path) -> None:
    """Write the page.

    Args:
        inputs: folder of the images that samples were made from.

    Raises:
        ConfigError: an image cannot be read, or the page cannot be written.
    """
    pairs = [pair.shown(inputs) for pair in comparison.pairs]
    data = {"format": FORMAT, "comparison": comparison.identity, "pairs": pairs}
    write_page(output, f"output={output}", "compare", data, title="Blind comparison", count=len(pairs))


def read_samples(folder: Path, place: str) -> list[Sample]:
    """The samples below a folder: of `vdtrain sample`, of `vdtrain evaluate` with `keep_images`, or of others.

    Args:
        place: setting and value that the folder comes from.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        folders = [folder, *sorted(each for each in folder.rglob("*") if each.is_dir())]
        found = [sample for each in folders if each.name not in NO_SAMPLES for sample in _of_folder(each, folder)]
    except OSError as error:
        raise ConfigError(f"{place}: {unreadable(error, folder, 'give a folder of samples')}") from error
    except ValueError as error:
        raise ConfigError(f"{place}: {one_line(error)}; give a folder of samples") from error
    if not found:
        raise ConfigError(f"{place}: holds neither images nor {CAPTIONS_FILE}; give a folder that vdtrain sample wrote")
    return found


def _of_folder(folder: Path, top: Path) -> Iterator[Sample]:
    """The samples that stand in a folder itself. One below the folder of the command is named after its task."""
    task = "" if folder == top or folder.name in NAMELESS else folder.name
    # An evaluation writes lines of file names, each with a prompt or a caption.
    rows = {Path(row["file_name"]).stem: row for row in _lines(folder / PROMPTS_FILE)}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not FLOW.match(path.stem):
            row = rows.get(path.stem, {})
            flow, given = _recorded(_metadata(path), int(path.stem) if path.stem.isdecimal() else 0)
            prompt, source = row.get("prompt", given), _within(top, folder, row.get("real"))
            # Others make images from prompts.
            own = task or row.get("flow", flow) or ("text-to-image" if prompt else "")
            yield Sample(str(own), path.stem, prompt and str(prompt), path, source)
        elif match := NUMBERED_CAPTIONS.fullmatch(path.name):
            settings, lines = _json(path.with_suffix(".json")), read_record(path).decode("utf-8", "replace")
            for number, line in enumerate(lines.splitlines(), start=int(match[1] or 0)):
                flow, given = _recorded(settings, number)
                yield Sample(task or flow, f"{number:04d}", given, line)
        elif path.suffix == ".jsonl" and (flow_name := FLOW.match(path.stem)):
            for row in _lines(path):
                name = Path(row["file_name"]).stem
                source = _within(top, folder, f"images/real/{name}.png")
                yield Sample(flow_name[0], name, None, str(row.get("caption", "")), source)


def _within(top: Path, folder: Path, name: Any) -> Path | None:
    """The file of that name from `folder`, if it is there and below `top`: a list of names may be a stranger's."""
    path = (folder / name).resolve() if isinstance(name, str) else None
    return path if path is not None and path.is_relative_to(top.resolve()) and path.is_file() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON tables with a "file_name"; none if there is no such file."""
    if not path.is_file():
        return []
    rows = (json.loads(line) for line in read_record(path).decode("utf-8", "replace").splitlines() if line.strip())
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("file_name"), str)]


def _metadata(path: Path) -> Any:
    """The settings in the metadata of an image that `vdtrain sample` wrote; None in others."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info["vdtrain"])
    except (*IMAGE_ERRORS, *SHAPE_ERRORS):
        return None


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _recorded(settings: Any, number: int) -> tuple[str, str | None]:
    """Flow and input of a sample by its number, where the settings that it was made with tell them."""
    flow = str(settings.get("flow", "")) if isinstance(settings, Mapping) else ""
    try:
        number -= settings.get(FIRST, 0)
        return flow, str(settings["inputs"][number // settings["samples_per_input"]]) if number >= 0 else None
    except (*SHAPE_ERRORS, ZeroDivisionError):
        return flow, None


def _keyed(samples: Sequence[Sample], named: Collection[str]) -> Iterator[tuple[tuple[str, ...], Sample]]:
    """Each sample with its task, its input or name, and how many before it have the same.

    Args:
        named: tasks whose samples match by name.
    """
    seen: Counter[tuple[str, str]] = Counter()
    for sample in samples:
        key = (sample.task, sample.name if sample.task in named else str(sample.given))
        yield (*key, str(seen[key])), sample
        seen[key] += 1


def _shown(content: str | Path) -> dict[str, str]:
    if isinstance(content, str):
        return {"text": content}
    try:
        with Image.open(content) as image:
            return {"image": embedded(image, SIDE, QUALITY)}
    except IMAGE_ERRORS as error:
        raise ConfigError(f"{content}: is no image that can be read; make it again, or remove it") from error


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
