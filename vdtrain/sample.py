"""Make pictures and captions with a trained model.

vdtrain sample checkpoint=runs/stage3_four_flow flow=text-to-image 'inputs=["a red circle"]' output_dir=samples
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from vdtrain.compose import ConfigError, run_verb
from vdtrain.config import SampleConfig

USAGE = """\
Usage: vdtrain sample checkpoint=RUN flow=FLOW 'inputs=["...", "..."]' [SETTING=VALUE ...]

Make samples from inputs. FLOW is text-to-image, image-to-image, image-to-text or text-to-text; inputs are captions
or picture files, by the flow's context.

  --help              this text
  --cfg job           print the configuration and stop

Examples:
  vdtrain sample checkpoint=runs/stage3_four_flow flow=text-to-image 'inputs=["a red circle", "a blue star"]'
  vdtrain sample checkpoint=runs/stage3_four_flow flow=image-to-text 'inputs=[picture.png]' output_dir=captions

Settings:
  checkpoint          run folder (its latest checkpoint) or checkpoint folder
  weights             ema (averaged) or model (as trained)
  output_dir          where 0000.png ... or captions.txt go
  resolution          side of the pictures in pixels
  samples_per_input, steps, guidance_scale, seed, device, threads
"""


def sample(config: SampleConfig, document: DictConfig) -> int:
    """Sample and write the results; returns the exit status."""
    if not config.inputs:
        raise ConfigError("inputs: empty; give at least one caption or picture file")
    for setting, value, choices in (
        ("weights", config.weights, ("ema", "model")),
        ("device", config.device, ("cpu", "cuda")),
    ):
        if value not in choices:
            raise ConfigError(f"{setting}={value}: choose one of {', '.join(choices)}")
    import torch
    from rich.progress import track

    from vdtrain.media import MEDIA
    from vdtrain.pipeline import VersatileDiffusion

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: PyTorch finds no GPU here; choose device=cpu or repair the driver")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = VersatileDiffusion.from_checkpoint(config.checkpoint, config.weights, config.device)
    context, _, output = config.flow.partition("-to-")
    for modality in (context, output):
        if modality not in MEDIA:
            raise ConfigError(f"flow={config.flow}: no files are known for {modality!r}, only for {', '.join(MEDIA)}")
    repeated = [given for given in config.inputs for _ in range(config.samples_per_input)]
    inputs = MEDIA[context].read(repeated, config.resolution)
    interactive = sys.stdout.isatty()
    samples = model.generate(
        config.flow,
        inputs,
        resolution=config.resolution,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        progress=lambda turns: track(turns, config.flow) if interactive else turns,  # type: ignore[arg-type, return-value]
    )
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in document.items() if key not in ("output_dir", "device", "threads")}
    for file in MEDIA[output].write(samples, folder, {str(key): _plain(value) for key, value in settings.items()}):
        print(file)
    if isinstance(samples, list):
        print("\n".join(samples))
    return 0


def _plain(value: object) -> object:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vdtrain sample`."""
    return run_verb(USAGE, "sample", SampleConfig, sample, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
