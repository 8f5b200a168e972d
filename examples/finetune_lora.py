"""Low-rank adapters teach the demo's model pairs of colour and shape that it has never seen.

python examples/finetune_lora.py demo/runs-short

It draws and packs the new pairs, trains adapters on them, exports the sum of weights and adapters, and measures the
export with the detector of the demo. RUNS/lora/samples.png shows images before and after; RUNS/lora/report.json has the
figures. `make demo` comes first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from demo_report import STAGES, Accuracy, cpu_name, evaluate
from PIL import Image

from miniature.shapes import HELD_OUT, caption, draw, sample_scene
from vdtrain.checkpoint.format import Checkpoint
from vdtrain.checkpoint.store import Verification, latest
from vdtrain.pipeline import VersatileDiffusion
from vdtrain.training.continuation import trained_stage

IMAGES, SEED, PIXELS = 600, 30_000, 64
RUN = "lora"


def base_of(runs: Path) -> tuple[Path, Checkpoint]:
    """The run of the last stage that was trained, and its checkpoint."""
    for stage in reversed(STAGES):
        if (found := latest(runs / stage / "checkpoints", Verification.ALONE)) is not None:
            return runs / stage, found
    sys.exit(f"error: {runs}: holds no trained stage; `make demo` trains them")


def write_pairs(folder: Path, count: int) -> None:
    """Images of the pairs that the demo leaves out, each beside a text file with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    for number in range(count):
        scene = sample_scene(generator, held_out=True)
        Image.fromarray(draw(scene, PIXELS)).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(caption(scene, generator))


def run(*words: str) -> None:
    """Type a command."""
    print("$", *words, flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)


def finetune(runs: Path, base: Path, data: Path, flows: list[str], pairs: int, *settings: str) -> None:
    """Pack and index the pairs, train the adapters, export the sum."""
    own = ["data=own", f"data.root={data}"]
    sizes = [f"data.pack.{name}={PIXELS}" for name in ("image_size", "min_image_size")]
    run("data_pipeline", "pack", str(data / "images"), *own, *sizes)
    run("data_pipeline", "index", *own, f"data.shards={data}/packed")
    run(
        *("vdtrain", "train", "stage=finetune_four_flow", "model=tiny", "hardware=cpu", "tracking=none", *own),
        *(f"run_dir={runs / RUN}", f"stage.init_from={base}", f"stage.flows=[{','.join(flows)}]", "lora.rank=4"),
        *(
            "stage.learning_rate=3e-5",
            "stage.global_batch_size=64",
            "optimizer.warmup_samples=640",
            "optimizer.schedule=cosine",
        ),
        *(f"stage.phases=[{{resolution: 64, samples: {pairs}}}]", *settings),
    )
    exported = str(runs / RUN / "exported")
    run("vdtrain", "weights", "export", "safetensors", exported, str(runs / RUN), "model=tiny", "overwrite=true")


def plot(before: dict[str, Any], after: dict[str, Any], file: Path, columns: int = 8) -> None:
    """Images of the new pairs by text-to-image: the caption, the image before, the image after."""
    figure, axes = plt.subplots(2, columns, figsize=(1.7 * columns, 4.2))
    for line, (label, shown) in enumerate((("before", before), ("after", after))):
        for column in range(columns):
            cell = axes[line][column]
            cell.set(xticks=[], yticks=[])
            cell.imshow(shown["text-to-image"][column].permute(1, 2, 0).numpy())
            if line == 0:
                cell.set_title(textwrap.fill(shown["captions"][column], 18), fontsize=8)
        axes[line][0].set_ylabel(label)
    figure.tight_layout(h_pad=0.4, w_pad=0.4)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(folder: str, samples: str = "100", pairs: str = "25600", *settings: str) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    runs, count = Path(folder), int(samples)
    data = runs / RUN / "data"
    write_pairs(data / "images", IMAGES)
    base, begun = base_of(runs)
    flows = trained_stage(begun.state).flows
    finetune(runs, base, data, flows, int(pairs), *settings)
    shown: dict[str, dict[str, Any]] = {}
    accuracy: dict[str, dict[str, Accuracy]] = {}
    for name, source in (("before", base), ("after", runs / RUN / "exported")):
        model = VersatileDiffusion.from_checkpoint(str(source))
        shown[name], new = evaluate(model, count, held_out=True, flows=flows)
        accuracy[name] = {"new_pairs": new, "other_pairs": evaluate(model, count, held_out=False, flows=flows)[1]}
    plot(shown["before"], shown["after"], runs / RUN / "samples.png")
    last = latest(runs / RUN / "checkpoints", Verification.ALONE)
    assert last is not None
    trained, whole = (sum(layout.numel for layout in found.index.groups) for found in (last, begun))
    result = {
        "what": "pairs of colour and shape that the base was never shown, learnt by low-rank adapters",
        "base": base.name,
        "pairs": sorted(" ".join(pair) for pair in HELD_OUT),
        "pairs_trained": int(pairs),
        "parameters": {"adapters": trained, "whole": whole, "share": trained / whole},
        "accuracy": accuracy,
        "samples_per_flow": count,
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__},
    }
    (runs / RUN / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    for flow in flows:
        figures = [accuracy[when]["new_pairs"][flow] for when in ("before", "after")]
        print(flow, *(f"{kind}: {figures[0][kind]:.0%} -> {figures[1][kind]:.0%}" for kind in ("colour", "shape")))
    print(f"{trained:,} of {whole:,} parameters trained; {runs / RUN / 'samples.png'}; {runs / RUN / 'report.json'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
