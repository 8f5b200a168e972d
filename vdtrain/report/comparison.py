"""A blind comparison of two folders of samples: the pairs, in an order and on sides that a seed draws."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

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
