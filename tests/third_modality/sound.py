"""A third modality from outside the package: short sounds, in all that `docs/modalities.md` asks for.

A sound is a waveform, float32 [256] in -1..1. Its pitch stands for the colour of a drawn scene and its wave for the
shape, so that image, caption and sound of a sample say the same.
"""

from __future__ import annotations

import math
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.audio.layers import SoundDataLayers
from miniature.shapes import COLOURS, SHAPES
from vdtrain.data.batch import Batch
from vdtrain.data.stream import PairStream
from vdtrain.media import MODALITY_IO, ModalityIO

__all__ = ["FrameContext", "FrameVAE", "SoundDataLayers", "SoundStream", "sounds"]

SAMPLES, FRAME = 256, 16
FRAMES = SAMPLES // FRAME
# One period each: phase in 0..1 -> amplitude in -1..1.
WAVES: dict[str, Callable[[Tensor], Tensor]] = {
    "circle": lambda phase: torch.sin(2 * math.pi * phase),
    "square": lambda phase: torch.where(phase < 0.5, 1.0, -1.0),
    "triangle": lambda phase: 4 * (phase - 0.5).abs() - 1,
    "star": lambda phase: 2 * phase - 1,
    "cross": lambda phase: torch.where(phase < 0.125, 1.0, -1.0),
}


def sounds(captions: Sequence[str]) -> Tensor:
    """What captions of drawn scenes sound like: float32 [B, 256]."""
    made = []
    for caption in captions:
        words = caption.split()
        (colour,), (shape,) = ([word for word in words if word in names] for names in (COLOURS, SHAPES))
        periods = 4 + 2 * list(COLOURS).index(colour)
        made.append(WAVES[shape](torch.arange(SAMPLES) * periods / SAMPLES % 1))
    return torch.stack(made)


class SoundStream(PairStream):
    """The image-text stream with the sound of each caption."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield replace(batch, samples={**batch.samples, "sound": sounds(batch.samples["text"])})


class FrameVAE(nn.Module):
    """Cosine transform of every frame of 16 samples: latents [B, 16, 16], frequencies by frames. Nothing is lost."""

    transform: Tensor

    def __init__(self) -> None:
        super().__init__()
        places, frequencies = torch.arange(FRAME) + 0.5, torch.arange(FRAME)
        transform = (2 / FRAME) ** 0.5 * torch.cos(math.pi / FRAME * frequencies[:, None] * places)
        transform[0] /= 2**0.5
        self.register_buffer("transform", transform)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """[16, 16], whatever the size of images."""
        return FRAME, FRAMES

    def encode(self, samples: Tensor, noise: Tensor | None = None) -> Tensor:
        """Sounds [B, 256] to latents [B, 16, 16]; the posterior is a point, so that noise adds nothing."""
        return self.transform.float() @ samples.view(-1, FRAMES, FRAME).transpose(1, 2)

    def decode(self, latents: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Latents [B, 16, 16] to sounds [B, 256]."""
        frames = self.transform.float().T @ latents.float()
        return frames.transpose(1, 2).reshape(-1, SAMPLES).clamp(-1, 1)


class FrameContext(nn.Module):
    """A fixed projection of every frame: contexts [B, 16, width]."""

    projection: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("projection", torch.randn(FRAME, width, generator=generator) / FRAME**0.5)

    def encode(self, samples: Tensor) -> Tensor:
        """Sounds [B, 256] to contexts [B, 16, width]."""
        return samples.view(-1, FRAMES, FRAME).to(self.projection) @ self.projection

    def unconditional(self, batch: int, output: str) -> Tensor:
        """Silence, whatever is generated."""
        return self.projection.new_zeros(batch, FRAMES, self.projection.shape[1])


def read_sounds(paths: Sequence[str], size: tuple[int, int]) -> Tensor:
    """16-bit mono WAV files of 256 samples as float32 [B, 256]."""
    made = []
    for path in paths:
        with wave.open(path) as file:
            made.append(torch.frombuffer(bytearray(file.readframes(SAMPLES)), dtype=torch.int16) / 32767)
    return torch.stack(made)


def write_sounds(samples: Tensor, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """float32 [B, 256] as numbered WAV files."""
    files = [folder / f"{index:04d}.wav" for index in range(len(samples))]
    for path, sample in zip(files, (samples * 32767).round().to(torch.int16), strict=True):
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(sample.numpy().tobytes())
    return files


MODALITY_IO["sound"] = ModalityIO(read_sounds, write_sounds)
