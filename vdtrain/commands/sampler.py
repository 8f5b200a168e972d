"""What the commands that sample share: loading the model, reading the inputs, and writing the results."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vdtrain.config.schema import SamplerConfig
from vdtrain.diffusion.sampling import make_solver, spacing_note
from vdtrain.errors import ConfigError, unwritable
from vdtrain.files import check_output
from vdtrain.media import MODALITY_IO, ModalityIO
from vdtrain.pipeline import VersatileDiffusion
from vdtrain.progress import track

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLING = ("height", "width", "steps", "guidance_scale", "solver", "eta", "seed", "batch_size")
# Settings about the machine, which the metadata of an image leaves out.
LOCAL = ("output_dir", "device", "threads", "batch_size", "resolution")


class Sampler:
    """A loaded model with the settings of a command line.

    Args:
        raw_config: the same configuration, for the metadata of the results.

    Raises:
        ConfigError: a setting that cannot work, or no complete checkpoint.
    """

    def __init__(self, config: SamplerConfig, raw_config: DictConfig) -> None:
        check_sampler(config)
        check_output(Path(config.output_dir), f"output_dir={config.output_dir}")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config, self.raw_config = config, raw_config
        self.settings = {name: getattr(config, name) for name in SAMPLING}
        self.size = (config.height, config.width)
        self.model = VersatileDiffusion.from_checkpoint(
            config.checkpoint, config.weights, config.device, DTYPES[config.precision]
        )
        solver = make_solver(config.solver, self.model.schedule, config.steps, config.eta)
        self.steps_taken = len(solver.timesteps)
        if note := spacing_note(config.solver, self.model.schedule, config.steps):
            print(f"note: {note}", file=sys.stderr, flush=True)

    def read(self, modality: str, inputs: Sequence[str], size: tuple[int, int] | None = None) -> Any:
        """Inputs of a command line as a batch; images are squares unless `size` is given."""
        side = min(self.size)
        return modality_io(modality).read(inputs, size or (side, side))

    def progress(self, turns: Sequence[int]) -> Iterable[int]:
        """Show the sampling steps."""
        return track(turns, "sampling", "steps")

    def write(self, modality: str, samples: Any) -> int:
        """Write samples below `output_dir` and print what was written; returns the exit status."""
        folder = Path(self.config.output_dir)
        settings = OmegaConf.to_container(self.raw_config, resolve=True)
        assert isinstance(settings, Mapping)
        kept = {str(key): value for key, value in settings.items() if key not in LOCAL}
        if self.steps_taken != self.config.steps:
            kept["steps_taken"] = self.steps_taken
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = modality_io(modality).write(samples, folder, kept)
        except OSError as error:
            raise ConfigError(f"output_dir={folder}: {unwritable(error, folder)}") from error
        for file in files:
            print(file)
        if isinstance(samples, list):
            print("\n".join(samples))
        return 0


def check_sampler(config: SamplerConfig) -> None:
    """Refuse settings that no model can be loaded with.

    Raises:
        ConfigError: with the setting, its value and the remedy.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: PyTorch finds no GPU here; choose device=cpu or repair the driver")
    if not os.path.exists(config.checkpoint):
        raise ConfigError(
            f"checkpoint={config.checkpoint}: does not exist; give a run, checkpoint or weights folder as the first "
            "plain argument, or as checkpoint="
        )


def modality_io(modality: str) -> ModalityIO:
    """How files of a modality are read and written.

    Raises:
        ConfigError: this is not known for that modality.
    """
    if modality not in MODALITY_IO:
        raise ConfigError(
            f"modality {modality!r}: its files cannot be read or written, only those of {', '.join(MODALITY_IO)}"
        )
    return MODALITY_IO[modality]
