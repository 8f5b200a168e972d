"""The tiny preset's frozen parts, from its own YAML arguments and weights, and new images for tests."""

from functools import cache
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from miniature.corpus import draw_images, sample_scenes, write_captions
from miniature.detector import caption_attributes, detect
from miniature.shapes import Scene
from vdtrain.config.compose import config_folder
from vdtrain.config.instantiate import instantiate

FRESH_SEED = 20_221_115
"""No training uses this seed."""


def arguments(preset: str, modality: str, part: str) -> dict[str, Any]:
    config: Any = OmegaConf.to_container(OmegaConf.load(config_folder() / "model" / f"{preset}.yaml"))
    return config["modalities"][modality][part]


@cache
def tiny(modality: str, part: str) -> Any:
    built = instantiate(arguments("tiny", modality, part), f"model.modalities.{modality}.{part}")
    return built.eval().requires_grad_(False)


@cache
def fresh(count: int, pixels: int) -> tuple[list[Scene], Tensor, list[str]]:
    """Scenes, images uint8 [count, 3, pixels, pixels] and captions, which no part was trained on."""
    rng = np.random.default_rng(FRESH_SEED)
    scenes = sample_scenes(count, rng)
    return scenes, draw_images(scenes, pixels, rng), write_captions(scenes, rng)


def image_accuracy(images: Tensor, scenes: list[Scene]) -> tuple[float, float]:
    """Shares of images with the scene's colour, and with its shape."""
    seen = [detect(image) for image in images.permute(0, 2, 3, 1).numpy()]
    return _shares(seen, scenes)


def caption_accuracy(captions: list[str], scenes: list[Scene]) -> tuple[float, float]:
    """Shares of captions with the scene's colour, and with its shape."""
    return _shares([caption_attributes(text) for text in captions], scenes)


def normal(shape: torch.Size, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _shares(found: list[Any], scenes: list[Scene]) -> tuple[float, float]:
    colours = [colour == scene.colour for (colour, _), scene in zip(found, scenes, strict=True)]
    shapes = [shape == scene.shape for (_, shape), scene in zip(found, scenes, strict=True)]
    return float(np.mean(colours)), float(np.mean(shapes))
