"""Whether a device does what it should: short runs of the real commands on drawn images.

python benchmarks/gpu_checks.py resume [SETTING=VALUE ...]             # saved, resumed: are the last weights equal?
python benchmarks/gpu_checks.py losses --other "SETTING=VALUE ..." [SETTING=VALUE ...]     # equal losses of both?
python benchmarks/gpu_checks.py commands [SETTING=VALUE ...]           # does each command end as it should?

Settings are those of `vdtrain train`; --other is for the second run of `losses`. The networks are the tiny preset's;
`losses` gives them the widths, and so the head sizes, of the full size's first two levels with --wide.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vdtrain.tracking.surroundings import commit, versions

# The root, whose tests draw the images.
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.pairs import write_pairs
from vdtrain.checkpoint.folder import CHECKPOINTS, candidates
from vdtrain.checkpoint.format import Checkpoint
from vdtrain.commands import train
from vdtrain.tracking.metrics import read_metrics

# A difference as a share of what the steps moved the weights; kernels may add in another order. Losses in bf16.
RESUME_SHARE, LOSS_TOLERANCE = 0.01, 0.01
STEPS, BATCH, RESOLUTION = 6, 8, 64
WIDE = ("model.diffuser.channels=[320,640]", "model.diffuser.heads=8", "model.diffuser.norm_groups=32")


# The Python API on a GPU, on a CPU where there is none.
API = """
import torch
from vdtrain.pipeline import VersatileDiffusion
pipeline = VersatileDiffusion.from_checkpoint("tiny", device="cpu").to("cuda" if torch.cuda.is_available() else "cpu")
generator = torch.Generator().manual_seed(0)
(image,) = pipeline.generate("text-to-image", "a red circle", num_inference_steps=4, generator=generator)
print(image.size, pipeline.generate("image-to-text", image, num_inference_steps=4))
"""


def settings_of(folder: Path, name: str, words: Sequence[str]) -> list[str]:
    """Settings of a short run of the tiny preset, in a folder of that name."""
    return [
        "stage=stage3_four_flow",
        "model=tiny",
        "data=shapes",
        "tracking=none",
        f"stage.phases=[{{resolution:{RESOLUTION},samples:{STEPS * BATCH}}}]",
        f"stage.global_batch_size={BATCH}",
        f"+hardware.micro_batch_size={{{RESOLUTION}:{BATCH}}}",
        "stage.init_from=null",
        "optimizer.warmup_samples=0",
        "log_every_steps=1",
        f"checkpoint.every_steps={STEPS // 2}",
        f"data.manifest={folder}/data/manifest",
        f"run_dir={folder}/{name}",
        *words,
    ]


def run(folder: Path, name: str, words: Sequence[str]) -> Path:
    """Train a few steps; the folder of the run.

    Raises:
        SystemExit: the run failed.
    """
    settings = settings_of(folder, name, words)
    if status := train.main(settings):
        raise SystemExit(f"`vdtrain train` ended with status {status}: {' '.join(settings)}")
    return folder / name


def resumed(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """The last weights of a run, beside those of one that resumes from its middle."""
    whole = run(folder, "whole", words)
    shutil.copytree(whole, folder / "resumed")
    last, middle = candidates(folder / "resumed" / CHECKPOINTS)
    shutil.rmtree(last)
    begun = {name: tensor.clone() for name, tensor in Checkpoint.open(middle).unchecked_weights("model").items()}
    run(folder, "resumed", words)
    one, other = (Checkpoint.open(folder / name / CHECKPOINTS / last.name) for name in ("whole", "resumed"))
    weights, again = one.unchecked_weights("model"), other.unchecked_weights("model")
    return {
        "steps": [middle.name, last.name],
        "largest_difference": max(_apart(weights[name], again[name]) for name in weights),
        "largest_movement": max(_apart(weights[name], begun[name]) for name in weights),
    }


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def equal_losses(folder: Path, words: Sequence[str], more: Sequence[str]) -> dict[str, Any]:
    """The losses of two runs that differ in some settings."""
    one, other = (
        [record["loss"] for record in read_metrics(run(folder, name, [*words, *extra]))]
        for name, extra in (("one", ()), ("other", more))
    )
    differences = [
        abs(second[flow] / first[flow] - 1) for first, second in zip(one, other, strict=True) for flow in first
    ]
    return {"other": list(more), "largest_relative_difference": max(differences), "losses": [one, other]}


def commands(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """How commands end that a user types: status, seconds and last line of each. All of one round run at once."""
    image = Path(__file__).parents[1] / "vdtrain" / "assets" / "images" / "star.png"
    watched = [
        *("data.validation.share=0.2", f"validation.every={2 * BATCH}", "validation.pairs=8", "samples.steps=4"),
        *("validation.time_share=null", f"samples.every={2 * BATCH}", "samples.time_share=null"),
    ]
    module, few = [sys.executable, "-m", "vdtrain"], "steps=4"
    trained = f"{folder}/trained"
    cache = ["data.latents=cached", f"data.latent_cache.folder={folder}/latents"]
    hardware = [word for word in words if word.startswith("hardware")]
    pipeline = [sys.executable, "-m", "data_pipeline"]
    latents = [f"data.latent_cache.resolutions=[{RESOLUTION}]", f"data.manifest={folder}/data/manifest", cache[1]]
    rounds: list[dict[str, list[str]]] = [
        {
            "train": [*module, "train", "gpus=1", *settings_of(folder, "trained", words), *watched],
            "latents": [*pipeline, "latents", "model=tiny", "data=shapes", *hardware, *latents],
            "sample": [*module, "sample", "tiny", "a red circle", few, f"output_dir={folder}/sample"],
            "describe": [*module, "sample", "tiny", str(image), "flow=image-to-text", few, f"output_dir={folder}/text"],
            "blend": [*module, "blend", "tiny", "text:a red circle", f"image:{image}", few, f"output_dir={folder}/two"],
            "edit": [*module, "edit", "tiny", str(image), "add=a star, red", few, f"output_dir={folder}/edited"],
            "api": [sys.executable, "-c", API],
        },
        {
            "sample own": [*module, "sample", trained, "a red circle", few, f"output_dir={folder}/own"],
            "train cached": [*module, "train", *settings_of(folder, "cached", words), *cache],
            "evaluate": [
                *(*module, "evaluate", trained, "data=shapes", f"data.manifest={folder}/data/manifest", few),
                *("flows=[text-to-image]", "samples=8", f"output_dir={folder}/figures", f"resolution={RESOLUTION}"),
            ],
            "report": [*module, "report", trained],
        },
    ]
    found: dict[str, Any] = {}
    for each in rounds:
        began, running = time.monotonic(), {}
        for name, command in each.items():
            log = (folder / f"{name}.log").open("w+")
            running[name] = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT), log
        for name, (process, log) in running.items():
            status = process.wait()
            log.seek(0)
            lines = log.read().strip().splitlines() or [""]
            found[name] = {"status": status, "ended_after": round(time.monotonic() - began, 1), "last_line": lines[-1]}
            print("\n".join((f"-- {name}: status {status}", *lines[-12 if status else -3 :])), flush=True)
            log.close()
    return {"commands": found}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("resume", "losses", "commands"))
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--other", default="", help="settings of the second run of `losses`, between spaces")
    parser.add_argument("--wide", action="store_true", help="layers as wide as the full size's first two levels")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    arguments = parser.parse_args(argv)
    words = [*(WIDE if arguments.wide else ()), *arguments.settings]
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as name:
        folder = Path(name)
        write_pairs(folder / "data")
        if arguments.check == "resume":
            found = resumed(folder, words)
            passed = found["largest_difference"] <= RESUME_SHARE * found["largest_movement"]
        elif arguments.check == "commands":
            found = commands(folder, words)
            passed = not any(each["status"] for each in found["commands"].values())
        else:
            found = equal_losses(folder, words, arguments.other.split())
            passed = found["largest_relative_difference"] <= LOSS_TOLERANCE
    found |= {"settings": words, "passed": passed, "versions": versions("torch"), "commit": commit()}
    print(json.dumps(found, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
