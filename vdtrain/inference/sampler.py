"""What the commands that sample share: checks before the model is loaded, reading, loading, and writing the results."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf

from vdtrain.config.command_schema import AUTO, BlendConfig, EditConfig, SampleConfig, SamplerConfig, SamplingConfig
from vdtrain.config.fields import shown
from vdtrain.config.schema import ModelConfig
from vdtrain.config.validation import check_sampling, missing_weights
from vdtrain.diffusion.sampling import make_solver, spacing_note
from vdtrain.diffusion.schedule import Schedule
from vdtrain.errors import ConfigError, unwritable
from vdtrain.files import check_output
from vdtrain.flows import Flow
from vdtrain.inference.checkpoint import Described, describe
from vdtrain.inference.questions import IMAGE, TEXT, confirm, looks_like_caption, looks_like_file
from vdtrain.media import MODALITY_IO, ModalityIO, next_number
from vdtrain.pipeline import VersatileDiffusion
from vdtrain.progress import track
from vdtrain.redaction import redacted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLING = ("height", "width", "steps", "guidance_scale", "solver", "eta", "seed", "batch_size")
# Settings about the machine and the folder, which the metadata of an image leaves out.
LOCAL = ("output_dir", "device", "threads", "batch_size", "resolution", "trust", "overwrite", "literal")
# With tensor cores, half precision is several times as fast as float32.
TENSOR_CORES = (7, 0)
# Parameters from which a CPU takes minutes for a sample (docs/rehearsal.md).
LARGE = 200_000_000

Config = TypeVar("Config", bound=SamplerConfig)


class Sampler:
    """The settings of a command line, checked against what the checkpoint's records say; `load` loads the model.

    Args:
        raw_config: the same configuration, for the metadata of the results.
        checkpoint: described already; None describes that of `config`.

    Raises:
        ConfigError: a setting that cannot work, or no complete checkpoint.
    """

    def __init__(
        self,
        config: SampleConfig | BlendConfig | EditConfig,
        raw_config: DictConfig,
        checkpoint: Described | None = None,
    ) -> None:
        self.checkpoint: Described = checkpoint or describe(config)
        self.config = config = settled(config, self.checkpoint.model)
        self.raw_config, self.changed = raw_config, dict[str, Any]()
        check_sampler(config, self.checkpoint.model)
        folder = Path(config.output_dir)
        check_output(folder, f"output_dir={folder}")
        self.settings = {name: getattr(config, name) for name in SAMPLING}
        self.size = (self.settings["height"], self.settings["width"])
        self.steps_taken, self.first = len(_solver(config, self.checkpoint.model).timesteps), 0

    def flow(self, name: str, inputs: Sequence[str]) -> Flow:
        """The flow, whose inputs have been looked at: a caption for a flow from images may be meant for one from text.

        Raises:
            ConfigError: the checkpoint has no such flow, or an input is not what it takes.
        """
        flow = self.checkpoint.flow(name)
        from_images = flow.context == IMAGE
        odd = next((each for each in enumerate(inputs) if from_images and looks_like_caption(each[1])), None)
        other = Flow(flow.output, TEXT)
        if odd is None or os.path.exists(os.path.expanduser(odd[1])) or not set(other.groups) <= self.checkpoint.groups:
            self.check_captions(flow.context, inputs, "inputs", f"flow=image-to-{flow.output}")
            return flow
        confirm(
            f"inputs.{odd[0]}={odd[1]}",
            f"no such file, and it looks like a caption, but flow={flow} takes image files",
            f"Is it a caption, for flow={other}?",
            f"for a caption write flow={other}",
        )
        self.changed["flow"] = other.name
        return other

    def check_captions(self, modality: str, inputs: Sequence[str], setting: str, remedy: str = "") -> None:
        """Ask about captions that look like names of files.

        Args:
            remedy: how a file is given.

        Raises:
            ConfigError: one is not meant.
        """
        for index, text in enumerate(inputs):
            if modality == TEXT and not self.config.literal and looks_like_file(text):
                confirm(
                    f"{setting}.{index}={text}" if len(inputs) > 1 or setting == "inputs" else f"{setting}={text}",
                    "looks like a file, but captions are taken here",
                    "Is it a caption?",
                    f"literal=true takes it as a caption{remedy and f', and {remedy} as a file'}",
                )

    def read(self, modality: str, inputs: Sequence[str], size: tuple[int, int] | None = None) -> Any:
        """Inputs of a command line as a batch; images are squares unless `size` is given."""
        side = min(self.size)
        return modality_io(modality).read(inputs, size or (side, side))

    def load(self, output: str, what: str) -> VersatileDiffusion:
        """Say what will be done, and load the model.

        Args:
            output: modality of the samples.
            what: the flow, for people.
        """
        config, found = self.config, self.checkpoint
        self.first = 0 if config.overwrite else next_number(Path(config.output_dir), output)
        print(said(config, found, what), file=sys.stderr, flush=True)
        if self.first:
            line = f"{config.output_dir} holds {self.first} samples; numbers go on from {self.first:04d}"
            print(f"note: {line}, and overwrite=true replaces them", file=sys.stderr, flush=True)
        for note in notes(config, found):
            print(f"note: {note}", file=sys.stderr, flush=True)
        return load_model(config, found)

    def progress(self, turns: Sequence[int]) -> Iterable[int]:
        """Show the sampling steps."""
        return track(turns, "sampling", "steps")

    def write(self, modality: str, samples: Any) -> int:
        """Keep samples and print what was written; returns the exit status."""
        for file in self.keep(modality, samples):
            print(file)
        if isinstance(samples, list):
            self.say(samples)
        return 0

    def say(self, captions: Sequence[str]) -> None:
        """Print captions."""
        print("\n".join(captions))

    def keep(self, modality: str, samples: Any) -> list[Path]:
        """Write samples with their settings below `output_dir`; the files."""
        folder = Path(self.config.output_dir)
        settings = redacted(OmegaConf.to_container(self.raw_config, resolve=True))
        assert isinstance(settings, Mapping)
        resolved = {name: getattr(self.config, name) for name in ("height", "width", "precision")}
        settings = {**settings, **resolved, **self.changed}
        kept = {str(key): _named(value) for key, value in settings.items() if key not in LOCAL}
        if self.steps_taken != self.config.steps:
            kept["steps_taken"] = self.steps_taken
        if self.first:
            kept["first"] = self.first
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return modality_io(modality).write(samples, folder, kept)
        except OSError as error:
            raise ConfigError(f"output_dir={folder}: {unwritable(error, folder)}") from error


def load_model(config: SamplerConfig, found: Described) -> VersatileDiffusion:
    """The model of a checkpoint.

    Args:
        config: settled.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return VersatileDiffusion.from_checkpoint(
        str(found.path), config.weights, config.device, DTYPES[config.precision], config.trust
    )


def _named(value: Any) -> Any:
    """A setting for the metadata of an image: of an absolute path, which tells of this machine, the name alone."""
    if isinstance(value, Mapping):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_named(each) for each in value]
    if isinstance(value, str) and os.path.isabs(value) and os.path.exists(value):
        return os.path.basename(os.path.normpath(value))
    return value


def settled(config: Config, model: ModelConfig) -> Config:
    """The configuration with a device, a precision and a size in the place of `auto` and null.

    Raises:
        ConfigError: a GPU is asked for, and there is none.
    """
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise ConfigError("device=cuda: PyTorch finds no GPU here; choose device=cpu or repair the driver")
    device = ("cuda" if gpu else "cpu") if config.device == AUTO else config.device
    precision = config.precision
    if precision == AUTO:
        fast = device == "cuda" and torch.cuda.get_device_capability() >= TENSOR_CORES
        precision = "fp16" if fast else "fp32"
    side = config.resolution if config.resolution is not None else model.resolution
    height, width = (side if each is None else each for each in (config.height, config.width))
    return replace(config, device=device, precision=precision, resolution=side, height=height, width=width)


def side_of(config: SamplerConfig) -> int:
    """The resolution of a settled configuration."""
    assert config.resolution is not None
    return config.resolution


def check_sampler(config: SamplerConfig, model: ModelConfig) -> None:
    """Refuse settings that no sample can be drawn with, and weights of frozen parts that are missing.

    Args:
        config: settled.

    Raises:
        ConfigError: with the setting, its value and the remedy.
    """
    check_sampling(SamplingConfig(**{each.name: getattr(config, each.name) for each in fields(SamplingConfig)}), model)
    _solver(config, model)
    for line in missing_weights(model):
        raise ConfigError(line)


def said(config: SamplerConfig, found: Described, what: str) -> str:
    """One line on what a command takes and does."""
    weights = f" ({config.weights})" if found.state else ""
    return (
        f"takes: {found.path}{weights}, {what}, on {config.device} in {config.precision}, {config.width} x "
        f"{config.height}, {config.solver} with {config.steps} steps, guidance {shown(config.guidance_scale)}, seed "
        f"{config.seed}, into {config.output_dir}"
    )


def notes(config: SamplerConfig, found: Described) -> Iterable[str]:
    """What a user should know before a long wait."""
    if note := spacing_note(config.solver, Schedule(found.model.schedule), config.steps):
        yield note
    if config.device == "cpu" and found.parameters > LARGE:
        yield (
            f"device=cpu: {found.parameters / 1e9:.1f} billion parameters take minutes for each sample on a CPU; "
            "fewer steps with solver=unipc take less, and a GPU takes seconds"
        )


def _solver(config: SamplerConfig, model: ModelConfig) -> Any:
    return make_solver(config.solver, Schedule(model.schedule), config.steps, config.eta)


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
