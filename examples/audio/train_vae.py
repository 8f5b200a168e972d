"""Trains the VAE of the example's sounds on drawn tones: less than a minute on one core.

python -m examples.audio.train_vae demo/audio/vae.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from examples.audio.draw import Tone
from examples.audio.sound import SPREAD, AudioVAE, pitch, spectrogram

SOUNDS, BATCH, STEPS, RATE = 600, 32, 600, 2e-3
# Of the divergence from the unit normal distribution; the other part of the loss is the error of the spectrogram.
DIVERGENCE = 1e-3


def train(path: Path, steps: int = STEPS) -> None:
    """Train, and write the weights."""
    torch.manual_seed(0)
    generator = np.random.default_rng(1)
    sounds = torch.stack([Tone.sample(generator).sound() for _ in range(SOUNDS)])
    vae, expected = AudioVAE(), spectrogram(sounds)
    optimizer = torch.optim.AdamW(vae.parameters(), RATE)
    for step in range(1, steps + 1):
        rows = torch.from_numpy(generator.integers(SOUNDS, size=BATCH))
        mean, variance = vae.posterior(sounds[rows])
        latents = mean + torch.randn_like(mean) * (variance / 2).exp()
        error = (vae.decoder(latents) - expected[rows]).square().mean()
        divergence = (mean.square() + variance.exp() - variance - 1).mean() / 2
        optimizer.zero_grad()
        (error + DIVERGENCE * divergence).backward()
        optimizer.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step} | error {error:.4f} | divergence {divergence:.2f}", flush=True)
    with torch.no_grad():
        vae.spread.copy_(vae.posterior(sounds)[0].std() / SPREAD)
        some = sounds[:50]
        heard = (pitch(vae.decode(vae.encode(some))) - pitch(some)).abs().mean()
    print(f"latents divided by {vae.spread:.3f}, to a spread of {SPREAD}; sounds come back {heard:.2f} semitones off")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(vae.state_dict(), path)
    print(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Train by the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="of the weights")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args(argv)
    train(arguments.path, arguments.steps)


if __name__ == "__main__":
    main()
