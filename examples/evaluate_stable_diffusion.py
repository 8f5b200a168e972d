"""Images of a rival for `vdtrain evaluate images=`: Stable Diffusion, or another diffusers pipeline, from prompts.

    python examples/evaluate_stable_diffusion.py weights/stable-diffusion-v1-4 prompts.jsonl evaluation/sd/images
    vdtrain evaluate images=evaluation/sd/images data=coco2014 output_dir=evaluation/sd

PROMPTS is a table of names and prompts, such as the prompts.jsonl that `keep_images=true` writes. An image depends on
its prompt, its place in the table and the seed alone. Run the same command again after an interruption: images that are
there stay. On several GPUs, start one process for each with --share 0/8, 1/8 and so on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from vdtrain.config.compose import ConfigError
from vdtrain.evaluation.named import PROMPTS, read_texts, stem
from vdtrain.evaluation.pairs import file_stem
from vdtrain.files import atomic_write
from vdtrain.progress import Progress
from vdtrain.seeds import seed_of


def main(argv: list[str] | None = None) -> int:
    """Make the images that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a diffusers text-to-image pipeline")
    parser.add_argument("prompts", type=Path, help="jsonl, json, csv, tsv or txt of names and prompts")
    parser.add_argument("output", type=Path, help="folder of the images and of prompts.jsonl")
    parser.add_argument("--samples", type=int, help="the first prompts; all by default")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--share", default="0/1", help="NUMBER/PROCESSES: every so many-th batch")
    arguments = parser.parse_args(argv)
    try:
        make(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(arguments: argparse.Namespace) -> None:
    """Write prompts.jsonl and the missing images.

    Raises:
        ConfigError: the prompts or the model cannot be read, or the folder holds images of other settings.
    """
    from diffusers import DiffusionPipeline

    rows = read_texts(arguments.prompts, "PROMPTS", PROMPTS)[: arguments.samples]
    # Files without names have one prompt to a line.
    names = [file_stem(stem(name)) if name else f"{place:06d}" for place, (name, _) in enumerate(rows)]
    if len(set(names)) < len(names):
        raise ConfigError(f"PROMPTS={arguments.prompts}: two prompts have one name; give each image its own")
    number, _, processes = arguments.share.partition("/")
    if not (number.isdecimal() and processes.isdecimal() and int(number) < int(processes)):
        raise ConfigError(f"--share={arguments.share}: write NUMBER/PROCESSES, such as 0/8")
    if not (arguments.model / "model_index.json").is_file():
        raise ConfigError(f"MODEL={arguments.model}: no diffusers pipeline (no model_index.json); give its folder")
    settings = {
        **{name: getattr(arguments, name) for name in ("resolution", "steps", "guidance_scale", "seed", "precision")},
        **{"model": str(arguments.model), "batch_size": arguments.batch_size},
    }
    _claim(arguments.output, settings)
    lines = [
        json.dumps({"file_name": f"{name}.png", "prompt": text}, ensure_ascii=False)
        for name, (_, text) in zip(names, rows, strict=True)
    ]
    with atomic_write(arguments.output / "prompts.jsonl") as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    size = arguments.batch_size
    batches = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    own = [
        batch
        for batch in batches[int(number) :: int(processes)]
        if not all((arguments.output / f"{names[place]}.png").exists() for place in batch)
    ]
    if not own:
        print(f"{arguments.output}: all images are there")
        return
    precision = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[arguments.precision]
    pipeline = DiffusionPipeline.from_pretrained(
        arguments.model,
        torch_dtype=precision,
        local_files_only=True,
        safety_checker=None,
        requires_safety_checker=False,
    ).to(arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    with Progress("sampling", sum(map(len, own)), "images") as progress:
        for batch in own:
            # Numbers of the CPU are the same on every device.
            generators = [torch.Generator().manual_seed(seed_of(arguments.seed, place)) for place in batch]
            images = pipeline(
                [rows[place][1] for place in batch],
                height=arguments.resolution,
                width=arguments.resolution,
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance_scale,
                generator=generators,
            ).images
            for place, image in zip(batch, images, strict=True):
                with atomic_write(arguments.output / f"{names[place]}.png") as draft:
                    image.save(draft, "PNG")
            progress.advance(len(batch))
    print(f"{arguments.output}: {len(rows):,} prompts; measure them by vdtrain evaluate images={arguments.output}")


def _claim(output: Path, settings: dict[str, object]) -> None:
    """Write the settings beside the images, or compare them."""
    path = output / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name) != value:
                raise ConfigError(
                    f"OUTPUT={output}: holds images with another {name} ({before.get(name)}, now {value}); give another"
                )
        return
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
