"""The report of an evaluation: metrics.json, a contact sheet for each flow, the curve of guidance, a table, W&B."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from vdtrain.config.schema import TrackingConfig
from vdtrain.evaluation.scores import MODALITY_FIGURES
from vdtrain.evaluation.subjects import Variant
from vdtrain.files import write_text, written_whole
from vdtrain.tracking.surroundings import versions
from vdtrain.tracking.wandb_run import open_run, reason

METRICS_FILE = "metrics.json"
CURVE_FILE, CURVE_PLOT = "curve.json", "curve.png"
# The figures of the table and how they are shown; a column without a figure is left out.
METRICS = {
    "fid": ("FID", ".3f"),
    "kid": ("KID x 1000", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "clip_distance": ("CLIP distance", ".3f"),
    "clip_precision": ("CLIP precision", ".3f"),
    "clip_recall": ("CLIP recall", ".3f"),
    "clip_score": ("CLIP score", ".2f"),
    "bleu": ("BLEU-4", ".2f"),
    "cider": ("CIDEr-D", ".2f"),
    "distinct_2": ("distinct-2", ".3f"),
}
THOUSANDTHS = ("kid",)
# Of the libraries that metrics depend on.
VERSIONS = ("torch", "torchvision", "open_clip_torch", "nltk", "sacrebleu", "vdtrain")


def write_metrics(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write metrics.json; an earlier one is replaced."""
    path = folder / METRICS_FILE
    with written_whole(path, f"output_dir={folder}", overwrite=True) as draft:
        write_text(draft, json.dumps({**result, "versions": versions(*VERSIONS)}, indent=2) + "\n")
    return path


def write_lines(path: Path, folder: Path, lines: Sequence[Any]) -> None:
    """Write texts, or tables as JSON, one to a line."""
    texts = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    with written_whole(path, f"output_dir={folder}", overwrite=True) as draft:
        write_text(draft, "".join(f"{text}\n" for text in texts))


def write_sheet(path: Path, rows: Mapping[str, Any]) -> None:
    """Draw rows of samples, each below its label's row before, as an image; a row is uint8 [n, 3, H, W] or captions."""
    pyplot = _pyplot()
    columns = min(map(len, rows.values()))
    figure, axes = pyplot.subplots(len(rows), columns, figsize=(1.9 * columns, 1.95 * len(rows)), squeeze=False)
    for row, (label, samples) in enumerate(rows.items()):
        for column in range(columns):
            cell = axes[row][column]
            cell.set(xticks=[], yticks=[])
            cell.set_frame_on(row == 1)
            if isinstance(samples, Tensor):
                cell.imshow(samples[column].permute(1, 2, 0).numpy())
            else:
                # matplotlib reads text between dollar signs as mathematics.
                text = textwrap.fill(textwrap.shorten(samples[column], 140), 20).replace("$", r"\$")
                cell.text(0.5, 0.5, text, ha="center", va="center", fontsize=8)
        axes[row][0].set_ylabel(label, fontsize=9)
    figure.tight_layout(h_pad=0.3, w_pad=0.3)
    _save(figure, path)


def curve_of(flows: Mapping[str, Mapping[str, Any]], variants: Sequence[Variant]) -> dict[str, list[dict[str, Any]]]:
    """By flow, the figures at each guidance scale, by rising scale."""
    curve: dict[str, list[dict[str, Any]]] = {}
    for each in sorted(variants, key=lambda variant: variant.scale or 0.0):
        found = {name: _number(value) for name, value in flows[each.name].items()}
        curve.setdefault(each.flow.name, []).append({"guidance_scale": each.scale, **found})
    return curve


def write_curve(folder: Path, curve: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """Write the curve's figures as JSON, and plot FID over the CLIP score of each flow to images.

    Without FID the plot has the distance of CLIP's features.
    """
    place = f"output_dir={folder}"
    with written_whole(folder / CURVE_FILE, place, overwrite=True) as draft:
        write_text(draft, json.dumps(curve, indent=2) + "\n")
    drawn = {flow: points for flow, points in curve.items() if flow.endswith("-image") and "clip_score" in points[0]}
    if not drawn:
        return [folder / CURVE_FILE]
    figure, axes = _pyplot().subplots(1, len(drawn), figsize=(5.2 * len(drawn), 4.2), squeeze=False)
    for cell, (flow, points) in zip(axes[0], drawn.items(), strict=True):
        distance = "fid" if "fid" in points[0] else "clip_distance"
        places = [(point["clip_score"], point[distance]) for point in points]
        cell.plot(*zip(*places, strict=True), marker="o", markersize=5, linewidth=1.4, color="#2a6f97")
        for place_of, point in zip(places, points, strict=True):
            cell.annotate(
                f"{point['guidance_scale']:g}", place_of, textcoords="offset points", xytext=(6, 5), fontsize=9
            )
        cell.set(title=flow, xlabel="CLIP score (more is better)", ylabel=f"{METRICS[distance][0]} (less is better)")
        cell.margins(0.12)
        cell.grid(color="#dddddd", linewidth=0.6)
        cell.spines[["top", "right"]].set_visible(False)
    figure.suptitle("each point is a guidance scale", fontsize=9, color="#666666")
    figure.tight_layout()
    _save(figure, folder / CURVE_PLOT)
    return [folder / CURVE_FILE, folder / CURVE_PLOT]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    with written_whole(path, f"output_dir={path.parent}", overwrite=True) as draft:
        figure.savefig(draft, dpi=120, format="png")
    _pyplot().close(figure)


def print_table(result: Mapping[str, Any]) -> None:
    """Print one row for each flow, and one for the pairs: their CLIP score is the reference for the flows."""
    table = Table(title=f"{result['checkpoint']['path']}, {result['samples']:,} samples a flow")
    table.add_column("flow")
    known = {name for figures in result["flows"].values() for name in figures}
    # Precision and recall of one network are enough.
    repeated = {f"clip_{name}" for name in ("precision", "recall") if name in known}
    columns = METRICS | own_columns()
    shown = [name for name in columns if name in known - repeated]
    for name in shown:
        table.add_column(columns[name][0], justify="right")
    for flow, figures in result["flows"].items():
        table.add_row(flow, *(cell_of(name, figures.get(name)) for name in shown))
    if result["pairs"]:
        pairs = (cell_of(name, result["pairs"].get(name)) for name in shown)
        table.add_row("the pairs themselves", *pairs, style="dim")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def own_columns() -> dict[str, tuple[str, str]]:
    """The columns of further modalities' figures."""
    return {name: column for each in MODALITY_FIGURES.values() for name, column in each.columns.items()}


def cell_of(name: str, figure: Any) -> str:
    """A figure as tables show it; empty if there is none."""
    if figure is None:
        return ""
    form = (METRICS | own_columns())[name][1]
    if isinstance(figure, Mapping):
        return f"{figure['mean']:{form}} ± {figure['standard_error']:{form}}"
    return f"{figure * (1000 if name in THOUSANDTHS else 1):{form}}"


def _number(figure: Any) -> Any:
    return figure["mean"] if isinstance(figure, Mapping) else figure


def log_to_wandb(folder: Path, tracking: TrackingConfig, result: Mapping[str, Any], sheets: list[Path]) -> None:
    """Log metrics and sheets as a run of its own. An error of W&B becomes a warning on standard error."""
    if tracking.mode == "disabled":
        return
    figures: dict[str, Any] = {"pairs/clip_score": result["pairs"]["clip_score"]["mean"]} if result["pairs"] else {}
    for flow, found in result["flows"].items():
        for name, value in found.items():
            figures[f"{flow}/{name}"] = _number(value)
    kept = {name: result[name] for name in ("checkpoint", "settings", "samples")}
    try:
        run = open_run(tracking, dir=str(folder), name=folder.name, job_type="evaluate", config=kept)
        import wandb

        run.log(figures | {f"{sheet.stem}/samples": wandb.Image(str(sheet)) for sheet in sheets})
        run.finish()
    # The metrics are written. An error of W&B must not fail an evaluation of hours.
    except Exception as error:
        line = f"tracking.mode={tracking.mode}: W&B does not take this evaluation ({reason(error)}); its figures are in"
        print(f"warning: {line} {folder / METRICS_FILE}", file=sys.stderr, flush=True)
