"""What the demo's model has learnt: losses.png, samples.png and a table, from the run folders of the three stages.

python examples/demo_report.py demo/runs-short 64
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from miniature.detector import caption_attributes, detect
from miniature.shapes import COLOURS, SHAPES, Scene, caption, draw, sample_scene
from vdtrain.pipeline import VersatileDiffusion
from vdtrain.tracking.metrics import read_metrics

STAGES = ("stage1_single_flow", "stage2_dual_flow", "stage3_four_flow")
FLOWS = ("image-to-image", "text-to-image", "image-to-text", "text-to-text")
RESOLUTION, STEPS, GUIDANCE_SCALE = 64, 25, 3.0
# By flow: share of samples with the right colour and with the right shape.
Accuracy = dict[str, dict[str, float]]
# Not a seed that any training image was drawn from.
EVALUATION_SEED = 20_000


def loss_curves(runs: Path) -> dict[str, list[tuple[int, float, str, int]]]:
    """Per flow: (pairs seen since the first stage began, mean loss, stage, resolution) for every log interval."""
    curves: dict[str, list[tuple[int, float, str, int]]] = {flow: [] for flow in FLOWS}
    before = 0
    for stage in STAGES:
        records = read_metrics(runs / stage)
        for record in records:
            for flow, loss in record["loss"].items():
                curves[flow].append((before + record["samples"], loss, stage, record["resolution"]))
        before += records[-1]["samples"]
    return curves


def start_and_end(curve: list[tuple[int, float, str, int]]) -> tuple[float, float]:
    """Mean loss of the first and of the last intervals (a tenth of the flow's, at least two)."""
    count = max(2, len(curve) // 10)
    losses = [loss for _, loss, _, _ in curve]
    return float(np.mean(losses[:2])), float(np.mean(losses[-count:]))


def plot_losses(curves: dict[str, list[tuple[int, float, str, int]]], file: Path) -> None:
    """One curve per flow, the stages side by side, changes of resolution dotted."""
    figure, axes = plt.subplots(figsize=(10, 4.5))
    for flow, curve in curves.items():
        if curve:
            axes.plot([row[0] for row in curve], [row[1] for row in curve], label=flow, linewidth=1.4)
    longest = curves[FLOWS[0]]
    for before, after in pairwise(longest):
        if before[2:] != after[2:]:
            axes.axvline(before[0], color="grey", linewidth=1, linestyle="-" if before[2] != after[2] else ":")
    for stage in STAGES:
        places = [row[0] for row in longest if row[2] == stage]
        if places:
            axes.text(float(np.mean(places)), 1.02, stage, ha="center", transform=axes.get_xaxis_transform())
    axes.set(xlabel="image-text pairs seen", ylabel="mean squared error of the predicted noise", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)


def evaluation_set(count: int, held_out: bool) -> tuple[list[Scene], torch.Tensor, list[str]]:
    """Fresh scenes, their images uint8 [count, 3, R, R], and their captions."""
    generator = np.random.default_rng(EVALUATION_SEED + held_out)
    scenes = [sample_scene(generator, held_out=held_out) for _ in range(count)]
    drawn = np.stack([draw(scene, RESOLUTION) for scene in scenes])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()
    return scenes, images, [caption(scene, generator) for scene in scenes]


def attributes(samples: Any) -> list[tuple[str | None, str | None]]:
    """Colour and shape that generated images show or generated captions name."""
    if isinstance(samples, torch.Tensor):
        return [detect(image) for image in samples.permute(0, 2, 3, 1).numpy()]
    return [caption_attributes(text) for text in samples]


def evaluate(
    model: VersatileDiffusion, count: int, held_out: bool, flows: Sequence[str] = FLOWS
) -> tuple[dict[str, Any], Accuracy]:
    """Samples of every flow, with their sources, and the accuracy of their colour and shape."""
    scenes, images, captions = evaluation_set(count, held_out)
    shown: dict[str, Any] = {"images": images, "captions": captions}
    accuracy = {}
    for flow in flows:
        inputs: Any = images if flow.startswith("image") else captions
        samples = model.generate(
            flow,
            inputs,
            resolution=RESOLUTION,
            steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            seed=1,
            output_type="tensor",
        )
        shown[flow] = samples
        right = [
            (colour == scene.colour, shape == scene.shape)
            for (colour, shape), scene in zip(attributes(samples), scenes, strict=True)
        ]
        accuracy[flow] = dict(zip(("colour", "shape"), map(float, np.mean(right, axis=0)), strict=True))
    return shown, accuracy


def plot_samples(shown: dict[str, Any], file: Path, columns: int = 8) -> None:
    """A labelled grid: what each flow was given, above what it made of it."""
    rows = [
        ("text-to-image", "captions"),
        ("image-to-image", "images"),
        ("image-to-text", "images"),
        ("text-to-text", "captions"),
    ]
    figure, axes = plt.subplots(2 * len(rows), columns, figsize=(1.7 * columns, 2 * 1.75 * len(rows)))
    for row, (flow, source) in enumerate(rows):
        for line, (label, samples) in enumerate((("given", shown[source]), (flow, shown[flow]))):
            for column in range(columns):
                cell = axes[2 * row + line][column]
                cell.set(xticks=[], yticks=[])
                cell.set_frame_on(line == 1)
                if isinstance(samples, torch.Tensor):
                    cell.imshow(samples[column].permute(1, 2, 0).numpy())
                else:
                    cell.text(0.5, 0.5, textwrap.fill(samples[column], 16), ha="center", va="center", fontsize=8)
                if column == 0:
                    cell.set_ylabel(label, fontsize=9)
    figure.tight_layout(h_pad=0.3, w_pad=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def print_table(losses: dict[str, tuple[float, float]], seen: dict[str, Any], held_out: dict[str, Any]) -> None:
    table = Table(title="What the model has learnt (accuracy; chance in the last line)")
    for heading in ("flow", "loss at start", "at end", "fall", "colour", "shape", "held-out colour", "held-out shape"):
        table.add_column(heading, justify="left" if heading == "flow" else "right")
    for flow in FLOWS:
        start, end = losses[flow]
        cells = [f"{part[flow][kind]:.0%}" for part in (seen, held_out) for kind in ("colour", "shape")]
        table.add_row(flow, f"{start:.3f}", f"{end:.3f}", f"{1 - end / start:.0%}", *cells)
    chance = [f"{1 / len(COLOURS):.1%}", f"{1 / len(SHAPES):.1%}"]
    table.add_row("chance", "", "", "", *chance, *chance, style="dim")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.processor()


def main(runs: str, samples_per_flow: str = "64") -> None:
    torch.set_num_threads(2)
    folder, count = Path(runs), int(samples_per_flow)
    curves = loss_curves(folder)
    plot_losses(curves, folder / "losses.png")
    model = VersatileDiffusion.from_checkpoint(str(folder / STAGES[-1]))
    shown, seen = evaluate(model, count, held_out=False)
    _, held_out = evaluate(model, count // 2, held_out=True)
    plot_samples(shown, folder / "samples.png")
    losses = {flow: start_and_end(curve) for flow, curve in curves.items()}
    print_table(losses, seen, held_out)
    result = {
        "losses": {flow: {"start": start, "end": end} for flow, (start, end) in losses.items()},
        "accuracy": {"seen": seen, "held_out": held_out},
        "chance": {"colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES)},
        "samples_per_flow": {"seen": count, "held_out": count // 2},
        "pairs_trained": {stage: read_metrics(folder / stage)[-1]["samples"] for stage in STAGES},
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__},
    }
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{folder / 'losses.png'}\n{folder / 'samples.png'}\n{folder / 'report.json'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
