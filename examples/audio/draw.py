"""Draws the example's data: pictures with captions, tones with captions, and scores: pictures of tones, with both.

python -m examples.audio.draw demo/audio/shards             1,200 samples in three tars
python -m examples.audio.draw demo/audio/shards --scale 4   four times as many
"""

from __future__ import annotations

import argparse
import io
import math
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from examples.audio.sound import RATE, SAMPLES, wave_bytes
from miniature.shapes import caption, draw, sample_scene

PITCHES = {"low": 262.0, "middle": 523.0, "high": 1047.0}
KINDS = ("tone", "trill", "slide")
# Semitones: by which a sound differs from its pitch, the interval of a trill and of a slide.
OFF, TRILL, SLIDE = 0.5, 3.0, 5.0
TRILLS_A_SECOND = 12
SIDE = 64
COUNTS = {"pictures": 300, "tones": 600, "scores": 300}


@dataclass(frozen=True)
class Tone:
    """A sound, and what it is called.

    Attributes:
        semitones: float64 [4096] its pitch over time, above 1 Hz.
    """

    pitch: str
    kind: str
    semitones: np.ndarray

    @classmethod
    def sample(cls, generator: np.random.Generator) -> Tone:
        """A random one."""
        pitch, kind = str(generator.choice(list(PITCHES))), str(generator.choice(KINDS))
        times = np.arange(SAMPLES) / RATE
        start = 12 * math.log2(PITCHES[pitch]) + generator.uniform(-OFF, OFF)
        moves = {
            "tone": np.zeros(SAMPLES),
            "trill": TRILL * (times * TRILLS_A_SECOND % 1 < 0.5),
            "slide": SLIDE * times / times[-1],
        }
        return cls(pitch, kind, start + moves[kind])

    @property
    def caption(self) -> str:
        return f"a {self.pitch} {self.kind}"

    def sound(self) -> Tensor:
        """Its waveform [4096]."""
        phase = 2 * np.pi * np.cumsum(2 ** (self.semitones / 12)) / RATE
        fade = np.minimum(1, np.minimum(np.arange(SAMPLES), np.arange(SAMPLES)[::-1]) / 200)
        return torch.from_numpy(0.5 * fade * (np.sin(phase) + 0.3 * np.sin(2 * phase)) / 1.3).float()

    def picture(self) -> Image.Image:
        """Its pitch over time, as a line on white."""
        image = Image.new("RGB", (SIDE, SIDE), "white")
        bottom, top = 12 * math.log2(PITCHES["low"]) - 3, 12 * math.log2(PITCHES["high"]) + 8
        heights = SIDE * (1 - (self.semitones[:: SAMPLES // SIDE] - bottom) / (top - bottom))
        ImageDraw.Draw(image).line(list(enumerate(heights.tolist())), "black", 5, "curve")
        return image


def samples(kind: str, count: int, seed: int = 0) -> Iterator[Mapping[str, bytes]]:
    """The members of each sample by their endings."""
    generator = np.random.default_rng([seed, list(COUNTS).index(kind)])
    for _ in range(count):
        if kind == "pictures":
            scene = sample_scene(generator)
            yield {"png": _png(Image.fromarray(draw(scene, SIDE))), "txt": caption(scene, generator).encode()}
            continue
        tone = Tone.sample(generator)
        drawn = {"png": _png(tone.picture())} if kind == "scores" else {}
        yield {**drawn, "wav": wave_bytes(tone.sound()), "txt": tone.caption.encode()}


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write(folder: Path, scale: float = 1.0) -> None:
    """Write the three tars."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, count in COUNTS.items():
        with tarfile.open(folder / f"{kind}.tar", "w") as tar:
            for number, members in enumerate(samples(kind, max(2, round(scale * count)))):
                for ending, content in members.items():
                    info = tarfile.TarInfo(f"{number:06d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        print(folder / f"{kind}.tar")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw by the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of samples")
    arguments = parser.parse_args(argv)
    write(arguments.folder, arguments.scale)


if __name__ == "__main__":
    main()
