"""What the latent cache saves: the image VAE's encoder as a share of the frozen part of a training step.

python benchmarks/latents.py [--device cuda --model versatile_diffusion --resolutions 256 512 --batch 16]

The frozen part is what every step of the four-flow stage does before the diffuser: image VAE, text VAE, both context
encoders. With cached moments the first of them is a draw. Networks have random weights, which take as long; needs
PyTorch and diffusers, no shards and no process group. Writes benchmarks/results/latents.json, or latents_cuda.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from timing import seconds_of

from vdtrain.config.command_schema import LatentsConfig
from vdtrain.config.compose import compose, to_object
from vdtrain.models.frozen import FrozenParts, build_frozen

RESULTS = Path(__file__).parent / "results"
CAPTION = "a large photograph of a small red boat on a blue lake, with mountains behind it"


def frozen_parts(name: str, device: torch.device, precision: str) -> tuple[FrozenParts, list[str]]:
    """The model's frozen parts with random weights, and the modalities whose captions can be tokenised here."""
    model = to_object(compose("latents", [f"model={name}", "data=shapes", "hardware=cpu"]), LatentsConfig).model

    def without_files(arguments: dict[str, Any]) -> dict[str, Any]:
        # Tokenizers of the full size are not part of the package: its text parts are left out of the sum below.
        missing = {key for key, value in arguments.items() if str(value).endswith((".json", ".safetensors"))}
        kept = {key for key in missing if str(arguments[key]).startswith("asset:")}
        return {key: value for key, value in arguments.items() if key not in missing - kept}

    modalities = {
        key: replace(part, vae=without_files(part.vae), context_encoder=without_files(part.context_encoder))
        for key, part in model.modalities.items()
    }
    torch.manual_seed(0)
    frozen = build_frozen(replace(model, modalities=modalities))
    frozen.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    try:
        frozen.encode({"text": [CAPTION]}, ["text"], ["text"])
    except ValueError:
        return frozen, ["image"]
    return frozen, ["image", "text"]


def measure(
    frozen: FrozenParts, modalities: list[str], resolution: int, batch: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 3, resolution, resolution), dtype=torch.uint8, generator=generator)
    samples: dict[str, Any] = {"image": images.to(device), "text": [CAPTION] * batch}
    samples = frozen.prepare({name: samples[name] for name in modalities}, modalities, modalities)
    shape = frozen.latent_shape("image", (resolution, resolution))
    noise = {"image": torch.randn(batch, *shape, generator=generator).to(device)}
    vae: Any = frozen.vaes["image"]
    with torch.no_grad():
        cached = vae.moments(images.to(device)).half().cpu()

    def draw() -> dict[str, torch.Tensor]:
        return {"image": cached.to(device, non_blocking=True)}

    taken = seconds_of(
        {
            "inline": lambda: frozen.encode(samples, modalities, modalities, noise),
            "cached": lambda: frozen.encode(samples, modalities, modalities, noise, draw()),
            "image_vae": lambda: frozen.encode(samples, ["image"], [], noise),
            "image_vae_cached": lambda: frozen.encode(samples, ["image"], [], noise, draw()),
        },
        device,
        rounds,
    )
    return {
        "resolution": resolution,
        "batch": batch,
        "parts": [f"{name} {part}" for name in modalities for part in ("VAE", "context encoder")],
        "milliseconds": {name: round(1e3 * value, 3) for name, value in taken.items()},
        "image_vae_share_of_frozen_part": round(taken["image_vae"] / taken["inline"], 3),
        "cached_over_inline": round(taken["cached"] / taken["inline"], 3),
        "bytes_per_image": cached[0].nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=None)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    frozen, modalities = frozen_parts(arguments.model, device, precision)
    result = {
        "claim": "with cached latents a step's frozen part is shorter by the image VAE's encoder",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "model": arguments.model,
        "precision": precision,
        "measured": [
            measure(frozen, modalities, side, arguments.batch, device, arguments.rounds)
            for side in arguments.resolutions
        ],
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    print(json.dumps(result, indent=2))
    (RESULTS / f"latents{'_cuda' if device.type == 'cuda' else ''}.json").write_text(
        json.dumps(result, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
