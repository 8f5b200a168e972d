"""The report of an evaluation: metrics.json, a contact sheet for each flow, a table, metrics for W&B."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from vdtrain.config.schema import TrackingConfig
from vdtrain.files import write_text, written_whole
from vdtrain.run.wandb_run import open_run, reason

METRICS_FILE = "metrics.json"
METRICS = {"fid": "FID", "clip_distance": "CLIP distance", "clip_score": "CLIP score"}
VERSIONS = ("torch", "torchvision", "open_clip_torch", "vdtrain")


def write_metrics(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write metrics.json; an earlier one is replaced."""
    path = folder / METRICS_FILE
    with written_whole(path, f"output_dir={folder}", overwrite=True) as draft:
        write_text(draft, json.dumps({**result, "versions": versions()}, indent=2) + "\n")
    return path


def versions() -> dict[str, str]:
    """Versions of the libraries that metrics depend on."""
    return {name: version(name) for name in VERSIONS}


def write_sheet(path: Path, given: Any, made: Any, flow: str) -> None:
    """Draw a flow's inputs above its outputs as an image; each is uint8 [n, 3, H, W] or captions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(given), len(made))
    figure, axes = pyplot.subplots(2, columns, figsize=(1.9 * columns, 3.9), squeeze=False)
    for row, (label, samples) in enumerate((("given", given), (flow, made))):
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
    with written_whole(path, f"output_dir={path.parent}", overwrite=True) as draft:
        figure.savefig(draft, dpi=120, format="png")
    pyplot.close(figure)


def print_table(result: Mapping[str, Any]) -> None:
    """Print one row for each flow, and one for the pairs: their CLIP score is the reference for the flows."""
    table = Table(title=f"{result['checkpoint']['path']}, {result['samples']:,} samples a flow")
    table.add_column("flow")
    for title in METRICS.values():
        table.add_column(title, justify="right")
    for flow, figures in result["flows"].items():
        table.add_row(flow, *(_cell(figures.get(name)) for name in METRICS))
    table.add_row("the pairs themselves", "", "", _cell(result["pairs"].get("clip_score")), style="dim")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _cell(figure: Any) -> str:
    if figure is None:
        return ""
    if isinstance(figure, Mapping):
        return f"{figure['mean']:.2f} ± {figure['standard_error']:.2f}"
    return f"{figure:.3f}"


def log_to_wandb(folder: Path, tracking: TrackingConfig, result: Mapping[str, Any], sheets: list[Path]) -> None:
    """Log metrics and sheets as a run of its own. An error of W&B becomes a warning on standard error."""
    if tracking.mode == "disabled":
        return
    figures: dict[str, Any] = {"pairs/clip_score": result["pairs"]["clip_score"]["mean"]} if result["pairs"] else {}
    for flow, found in result["flows"].items():
        for name, value in found.items():
            figures[f"{flow}/{name}"] = value["mean"] if isinstance(value, Mapping) else value
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
