"""`vdtrain report`: what the folders of a curriculum hold, as one page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vdtrain.config.instantiate import leaves
from vdtrain.data.decode import IMAGE_ERRORS
from vdtrain.errors import ConfigError, unreadable
from vdtrain.files import SHAPE_ERRORS, read_json
from vdtrain.redaction import redacted
from vdtrain.report.curriculum import EVALUATION_FILE, Run, evaluation_folders, moments, read_runs, stage_changes
from vdtrain.report.curves import sections
from vdtrain.report.page import IMAGE_SUFFIXES, embedded, thinned, write_page
from vdtrain.tracking.summary import age

# Moments of a flow's samples, longer side of an image in pixels, texts below one, changes of a start.
MOMENTS, SIDE, CAPTIONS, CHANGES = 30, 1400, 12, 30
# Characters of a value in a table.
TEXT = 300
FIGURES = {
    "fid": "FID",
    "kid": "KID",
    "clip_score": "CLIP score",
    "clip_distance": "CLIP distance",
    "bleu": "BLEU-4",
    "cider": "CIDEr-D",
    "distinct_2": "distinct-2",
}
# Beside the sheet of each flow, the curve of guidance.
PLOTS = ("curve",)


def write_report(folders: Sequence[Path], output: Path, evaluations: Sequence[Path], image_bytes: float) -> None:
    """Write the page of a curriculum.

    Args:
        folders: see `read_runs`.
        evaluations: folders beside those that stand below the runs'.
        image_bytes: of all images together.

    Raises:
        ConfigError: no run, an evaluation that cannot be read, or the page cannot be written.
        OSError: a run's file cannot be read.
    """
    runs = read_runs(folders)
    made, axes, remarks = sections([(run.before, [*run.records, *run.validations]) for run in runs])
    remarks += [f"{run.name}: {line}" for run in runs for line in run.summary.damages]
    measured = []
    for folder in evaluation_folders(runs, evaluations):
        try:
            measured.append(_evaluation(folder))
        except ConfigError as error:
            # Others may write files of that name below a run.
            if folder in evaluations:
                raise
            remarks.append(str(error))
    last = runs[-1]
    end = last.before + max(last.samples, 1)
    shown_films = films(runs, image_bytes - sum(len(image) for each in measured for _, image in each["sheets"]))
    write_page(
        output,
        f"output={output}",
        "report",
        {
            "xs": axes,
            "sections": [{"id": each["id"], "charts": each["charts"]} for each in made],
            "marks": list(marks(runs)),
            "stages": [{"from": run.before, "name": run.name} for run in runs],
            "end": end,
            "films": shown_films,
        },
        title=last.folder.resolve().name if len(runs) == 1 else f"{runs[0].name} to {last.name}",
        subtitle=", ".join(str(run.folder) for run in runs),
        cards=list(cards(runs)),
        notes=remarks,
        sections=made,
        films=shown_films,
        starts=list(starts(runs)),
        evaluations=measured,
        stage_changes=[
            {"title": f"Changed in {run.name}", "rows": [(name, *map(_text, each)) for name, each in changed.items()]}
            for run, changed in stage_changes(runs)
        ],
        configurations=[{"name": run.name, "text": yaml.safe_dump(run.config, sort_keys=False)} for run in runs],
        environment=list(environment(runs)),
        stage_names=[run.name for run in runs],
        made=_moment(datetime.now(UTC).timestamp()),
    )


def cards(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """The most important facts: name and value."""
    last = runs[-1]
    summary, samples = last.summary, sum(run.samples for run in runs)
    total = last.before + max(summary.total_samples, last.samples)
    yield "state", "complete" if summary.complete else f"phase {summary.phase} of {summary.phases}"
    yield "samples", f"{samples:,} of {total:,}" if samples < total else f"{samples:,}"
    yield "stages", f"{len(runs)}"
    if seconds := sum(run.seconds for run in runs):
        yield "time of training", age(seconds)
    if summary.pairs_per_second:
        yield "speed at the end", f"{summary.pairs_per_second:,.1f} pairs/s"
    for flow, loss in list(summary.record.get("loss", {}).items())[:4]:
        yield f"loss, {flow}", f"{loss:.4f}"
    yield "restarts", f"{sum(run.summary.restarts for run in runs)}"
    if summary.checkpoint is not None:
        yield "last checkpoint", f"step {summary.checkpoint.step:,}"


def marks(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Positions on the axis of samples: beginnings of stages and phases, and restarts."""
    for run in runs:
        yield {"x": run.before, "kind": "stage", "label": run.name, "short": run.name.split("_")[0]}
        phase = None
        for record in run.records:
            if record.get("phase") != phase:
                pixels = f"{record.get('resolution', '?')} px"
                begin = run.before + (record.get("samples", 0) if phase is not None else 0)
                if phase is not None:
                    yield {"x": begin, "kind": "phase", "label": f"{run.name}, {pixels}", "short": pixels}
                phase = record.get("phase")
        batch = run.records[-1].get("samples", 0) // max(1, run.records[-1]["step"]) if run.records else 0
        for event in run.summary.starts[1:]:
            label = f"restart from step {event.step:,}, {_moment(event.time)}"
            yield {"x": run.before + event.step * batch, "kind": "restart", "label": label, "short": ""}


def starts(runs: Sequence[Run]) -> Iterator[list[str]]:
    """Rows of the table of starts."""
    for run in runs:
        for event in run.summary.starts:
            hosts = ", ".join(event.hosts[:8]) + (f" and {len(event.hosts) - 8} more" if len(event.hosts) > 8 else "")
            changed = [f"{name}: {_text(was)} → {_text(becomes)}" for name, (was, becomes) in event.changed.items()]
            if len(changed) > CHANGES:
                changed = [*changed[:CHANGES], f"and {len(changed) - CHANGES} more"]
            yield [
                run.name,
                _moment(event.time),
                f"{event.step:,}",
                str(event.world_size or ""),
                hosts,
                event.job or "",
                "; ".join(changed),
            ]


def environment(runs: Sequence[Run]) -> Iterator[list[str]]:
    """Rows of the table of the environment: a name, then a value for each run."""
    found = [
        dict(leaves("", redacted(run.summary.starts[-1].environment))) if run.summary.starts else {} for run in runs
    ]
    for name in dict.fromkeys(name for each in found for name in each):
        yield [name, *(_text(each.get(name)) for each in found)]


def films(runs: Sequence[Run], image_bytes: float) -> list[dict[str, Any]]:
    """The samples of every flow over time, as images that have `image_bytes` at most."""
    found: dict[str, list[tuple[str, str, Path]]] = {}
    for run in runs:
        for count, folder in moments(run):
            label = f"{run.before + count:,} samples, {run.name}"
            for path in sorted(folder.iterdir()):
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    found.setdefault(path.stem, []).append((label, f"{run.before + count:,}", path))
    share = image_bytes / max(1, len(found))
    return [film for name, grids in found.items() if (film := _film(name, grids, share))["moments"]]


def _film(name: str, grids: Sequence[tuple[str, str, Path]], image_bytes: float) -> dict[str, Any]:
    made = [
        {"label": label, "short": short, "image": image, "captions": captions(path)}
        for label, short, path in thinned(grids, MOMENTS)
        if (image := _image(path)) is not None
    ]
    while len(made) > 1 and sum(len(each["image"]) for each in made) > image_bytes:
        made = thinned(made, len(made) * 2 // 3)
    return {"name": name, "moments": made}


def captions(path: Path) -> list[str]:
    """The texts of a grid, from the file of its name: what was given, and for captions what was made of it."""
    try:
        content = read_json(path.with_suffix(".json"))
        given, made = content["given"], content.get("made") or [None] * len(content["given"])
        pairs = zip(given[:CAPTIONS], made, strict=False)
        return [f"{before} → {after}" if after is not None else str(before) for before, after in pairs]
    except (OSError, *SHAPE_ERRORS):
        return []


def _image(path: Path) -> str | None:
    """An image of the page; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            return embedded(image, SIDE)
    except IMAGE_ERRORS:
        return None


def _evaluation(folder: Path) -> dict[str, Any]:
    """What a page tells of an evaluation: a table of its figures, and its contact sheets.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder / EVALUATION_FILE
    try:
        result = redacted(read_json(path))
        rows = {str(flow): _figures(figures) for flow, figures in result["flows"].items()}
        rows |= {"the pairs themselves": _figures(result["pairs"])} if result.get("pairs") else {}
        made_by = result.get("checkpoint") or {}
        about = [
            made_by.get("path"),
            made_by.get("weights"),
            *(f"{key}={result[key]}" for key in ("samples",) if key in result),
        ]
    except OSError as error:
        raise ConfigError(f"evaluations={folder}: {unreadable(error, path)}") from error
    except SHAPE_ERRORS as error:
        raise ConfigError(
            f"evaluations={folder}: {path} is no result of vdtrain evaluate; give another folder"
        ) from error
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    sheets = [(flow, image) for flow in (*PLOTS, *rows) if (image := _image(folder / f"{flow}.png")) is not None]
    return {
        "name": folder.name,
        "text": ", ".join(_text(each) for each in about if each),
        "heads": ["flow", *(FIGURES.get(name, name) for name in names)],
        "rows": [[flow, *(figures.get(name, "") for name in names)] for flow, figures in rows.items()],
        "sheets": sheets,
    }


def _figures(values: Mapping[str, Any]) -> dict[str, str]:
    """Figures as text: "31.2 ± 0.1" for a mean with its standard error."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and "mean" in value:
            found[name] = f"{value['mean']:.2f} ± {value.get('standard_error', 0):.2f}"
        elif isinstance(value, Mapping):
            found |= {f"{name}, {each}": text for each, text in _figures(value).items()}
        elif isinstance(value, int | float):
            found[name] = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return found


def _text(value: Any) -> str:
    """A value in a table, on one line and not endless."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = ", ".join(value)
    return "" if value is None else textwrap.shorten(str(value), TEXT, placeholder=" ...")


def _moment(time: float) -> str:
    try:
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):
        return "?"
