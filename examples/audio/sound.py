"""A modality from outside the package: sounds of half a second, in all that docs/modalities.md asks for.

A sound is a waveform, float32 [4096] in -1..1, at 8 kHz.
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdtrain.errors import ConfigError, one_line
from vdtrain.evaluation.scores import MODALITY_FIGURES, ModalityFigures
from vdtrain.media import MODALITY_IO, ModalityIO
from vdtrain.models.frozen_weights import load_weights

RATE, SAMPLES = 8000, 4096
# Of the spectrogram: 128 bins of 15.6 Hz, up to 2 kHz, at 32 times.
WINDOW, HOP, BINS, TIMES = 512, 128, 128, 32
CHANNELS, LENGTH = 16, 16
WIDTH = 64
# Of the latents that the diffuser sees. All 16 times of a tone tell its pitch: at a spread of 1 the pitch shows through
# nearly all noise, and the caption is worth little of the loss.
SPREAD = 0.4
# Rounds of the search for the phases of a spectrogram.
ROUNDS = 32


def spectrogram(sounds: Tensor) -> Tensor:
    """Waveforms [B, 4096] to log(1 + magnitude) [B, 128, 32]."""
    return torch.log1p(_transform(sounds.float()).abs()[:, :BINS, :TIMES])


def waveform(spectrograms: Tensor) -> Tensor:
    """The inverse, with phases by the algorithm of Griffin and Lim (1984); [B, 4096] in -1..1."""
    found = torch.expm1(spectrograms.float().clamp(min=0))
    magnitude = nn.functional.pad(found, (0, 1, 0, WINDOW // 2 + 1 - BINS))
    bins, times = torch.arange(WINDOW // 2 + 1.0)[:, None], torch.arange(TIMES + 1.0)
    phase = (2 * math.pi * HOP / WINDOW * bins * times).to(magnitude.device).expand_as(magnitude)
    for _ in range(ROUNDS):
        sounds = _inverse(torch.polar(magnitude, phase.contiguous()))
        phase = _transform(sounds).angle()
    return sounds.clamp(-1, 1)


def _transform(sounds: Tensor) -> Tensor:
    window = torch.hann_window(WINDOW, device=sounds.device)
    return torch.stft(sounds, WINDOW, HOP, window=window, return_complex=True)


def _inverse(spectrum: Tensor) -> Tensor:
    window = torch.hann_window(WINDOW, device=spectrum.device)
    return torch.istft(spectrum, WINDOW, HOP, window=window, length=SAMPLES)


class AudioVAE(nn.Module):
    """Spectrograms to latents [B, 16, 16], channels by times; `examples/audio/train_vae.py` trains it.

    Args:
        weights: a safetensors file; None for random weights.
    """

    spread: Tensor

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(BINS, WIDTH, 3, padding=1),
            nn.SiLU(),
            nn.Conv1d(WIDTH, WIDTH, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv1d(WIDTH, 2 * CHANNELS, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv1d(CHANNELS, WIDTH, 3, padding=1),
            nn.SiLU(),
            nn.ConvTranspose1d(WIDTH, WIDTH, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv1d(WIDTH, BINS, 3, padding=1),
        )
        # Latents are divided by it. Training makes their spread `SPREAD`.
        self.register_buffer("spread", torch.ones(()))
        if weights is not None:
            load_weights(self, weights, "model.modalities.audio.vae.weights")

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """[16, 16], whatever the size of images."""
        return CHANNELS, LENGTH

    def posterior(self, sounds: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents, before they are divided."""
        mean, variance = self.encoder(spectrogram(sounds).to(self.spread.dtype)).chunk(2, dim=1)
        return mean, variance.clamp(-20, 10)

    def encode(self, samples: Tensor, noise: Tensor | None = None) -> Tensor:
        """Waveforms [B, 4096] to latents [B, 16, 16]."""
        mean, variance = self.posterior(samples)
        drawn = mean if noise is None else mean + noise.to(mean) * (variance / 2).exp()
        latents: Tensor = drawn / self.spread
        return latents

    def decode(self, latents: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Latents [B, 16, 16] to waveforms [B, 4096]."""
        return waveform(self.decoder(latents.to(self.spread) * self.spread))


class AudioContext(nn.Module):
    """Contexts [B, 16, width]: a fixed projection of the latents at 16 times, and the times as sines and cosines.

    The latents have a spread of 1 here.
    """

    projection: Tensor
    times: Tensor

    def __init__(self, width: int, weights: str | None = None) -> None:
        super().__init__()
        self.vae = AudioVAE(weights)
        generator = torch.Generator().manual_seed(0)
        angles = torch.arange(LENGTH)[:, None] / 100 ** (torch.arange(width // 2) / (width // 2))
        self.register_buffer("projection", torch.randn(CHANNELS, width, generator=generator) / CHANNELS**0.5)
        self.register_buffer("times", torch.cat([angles.sin(), angles.cos()], dim=1))

    def encode(self, samples: Tensor) -> Tensor:
        """Waveforms [B, 4096] to contexts [B, 16, width]."""
        latents = self.vae.encode(samples) / SPREAD
        return latents.transpose(1, 2) @ self.projection + self.times

    def unconditional(self, batch: int, output: str) -> Tensor:
        """The times alone, whatever is generated."""
        return self.times.expand(batch, -1, -1)


def read_wave(data: bytes) -> Tensor:
    """A WAV file of 16 bits as float32 [4096]: its first channel, cut or filled with silence.

    Raises:
        ValueError: it is no such file, or has another rate.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            if (file.getframerate(), file.getsampwidth()) != (RATE, 2):
                raise ValueError(f"{file.getframerate()} Hz, {8 * file.getsampwidth()} bits; give {RATE} Hz, 16 bits")
            channels, frames = file.getnchannels(), file.readframes(SAMPLES)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"no WAV file ({one_line(error)})") from error
    sound = torch.frombuffer(bytearray(frames), dtype=torch.int16)[::channels] / 32767
    return nn.functional.pad(sound, (0, SAMPLES - len(sound)))


def wave_bytes(sound: Tensor) -> bytes:
    """A waveform [n] in -1..1 as a WAV file."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sound.clamp(-1, 1) * 32767).round().to(torch.int16).cpu().numpy().tobytes())
    return made.getvalue()


class WaveReader:
    """Reads the files of a stream: `data.stream.members.audio`."""

    def __call__(self, data: bytes) -> Tensor:
        return read_wave(data)


def read_sounds(paths: Sequence[str], size: tuple[int, int]) -> Tensor:
    """WAV files as float32 [B, 4096]."""
    made = []
    for path in paths:
        try:
            made.append(read_wave(Path(path).read_bytes()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {one_line(error)}") from error
    return torch.stack(made)


def write_sounds(samples: Tensor, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Waveforms [B, 4096] as numbered WAV files."""
    files = [folder / f"{index:04d}.wav" for index in range(len(samples))]
    for path, sample in zip(files, samples, strict=True):
        path.write_bytes(wave_bytes(sample))
    return files


def pitch(sounds: Tensor) -> Tensor:
    """The mean pitch of waveforms [n, 4096] in semitones above 1 Hz, [n, 1]: the strongest bin, where it is loud."""
    loudness, bins = spectrogram(sounds)[:, 4:].max(dim=1)
    weights = loudness * (loudness > 0.5 * loudness.amax(dim=1, keepdim=True))
    semitones = 12 * torch.log2((bins + 4.0) * RATE / WINDOW)
    return (semitones * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)


def pitch_error(generated: Tensor, real: Tensor) -> dict[str, float]:
    """The mean distance of pitches [N, 1], in semitones."""
    return {"pitch_error": float((generated - real).abs().mean())}


MODALITY_IO["audio"] = ModalityIO(read_sounds, write_sounds)
MODALITY_FIGURES["audio"] = ModalityFigures(pitch, pitch_error, {"pitch_error": ("pitch error", ".2f")})
