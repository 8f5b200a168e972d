"""`python -m miniature.frozen`: train the tiny preset's frozen parts anew, into `vdtrain/assets/tiny`.

They are small but real: an image VAE, an Optimus and a CLIP of the sizes in `conf/model/tiny.yaml`, trained on drawn
images and their captions, with tokenizers made of those captions. `--only NAME` rebuilds one of them. On two cores
all of it takes about half an hour; the same seed, machine and library versions give the same files.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from miniature.corpus import clip_tokenizer, decoder_tokenizer, encoder_tokenizer, sample_scenes, write_captions
from miniature.shapes import vocabulary
from miniature.training import Recipe, train_clip, train_image_vae, train_text_vae
from vdtrain.config.compose import config_folder
from vdtrain.config.instantiate import instantiate
from vdtrain.files import atomic_write
from vdtrain.models.clip import ClipImageContext, ClipTextContext
from vdtrain.models.frozen_weights import ASSETS, untied
from vdtrain.models.image_vae import ImageVAE
from vdtrain.models.optimus import Optimus
from vdtrain.progress import Progress

FOLDER = ASSETS / "tiny"
ENCODER_TOKENIZER, DECODER_TOKENIZER, CLIP_TOKENIZER = (
    f"{name}_tokenizer.json" for name in ("encoder", "decoder", "clip")
)
CAPTIONS = 20_000

RECIPES = {
    "image_vae": Recipe(steps=9000, batch=16, learning_rate=2e-3),
    "optimus": Recipe(steps=6000, batch=64, learning_rate=1.5e-3),
    "clip": Recipe(steps=2000, batch=128, learning_rate=1e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m miniature.frozen", description=__doc__)
    parser.add_argument("--only", choices=[*RECIPES], help="rebuild this part and leave the others as they are")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps instead of each part's own number")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_tokenizers(options.folder, options.seed)
    for name in [options.only] if options.only else RECIPES:
        own = RECIPES[name]
        recipe = own if options.steps is None else Recipe(options.steps, own.batch, own.learning_rate)
        start = time.monotonic()
        with Progress(name, recipe.steps, "steps") as progress:
            part = trained(name, recipe, options.folder, options.seed, progress)
        file = options.folder / f"{name}.safetensors"
        save(part, file)
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB after {(time.monotonic() - start) / 60:.1f} minutes")


def write_tokenizers(folder: Path, seed: int) -> None:
    """Make the three tokenizers, in seconds; the parts depend on them."""
    rng = np.random.default_rng(seed)
    captions = write_captions(sample_scenes(CAPTIONS, rng), rng)
    encoder_tokenizer(vocabulary()).save(str(folder / ENCODER_TOKENIZER))
    decoder_tokenizer(captions).save(str(folder / DECODER_TOKENIZER))
    clip_tokenizer(captions).save(str(folder / CLIP_TOKENIZER))


def trained(name: str, recipe: Recipe, folder: Path, seed: int, progress: Progress) -> nn.Module:
    """Train a part with the tokenizers in `folder`; returns the module to save."""
    torch.manual_seed(seed)  # the modules' own initialisation takes no generator
    if name == "image_vae":
        image_vae: ImageVAE = untrained("image", "vae")
        train_image_vae(image_vae, recipe, seed, progress)
        return image_vae.autoencoder
    if name == "optimus":
        optimus: Optimus = untrained(
            "text",
            "vae",
            encoder_tokenizer=str(folder / ENCODER_TOKENIZER),
            decoder_tokenizer=str(folder / DECODER_TOKENIZER),
        )
        train_text_vae(optimus, recipe, seed, progress)
        return optimus
    text: ClipTextContext = untrained("text", "context_encoder", tokenizer=str(folder / CLIP_TOKENIZER))
    image: ClipImageContext = untrained("image", "context_encoder")
    image.clip = text.clip
    train_clip(image, text, recipe, seed, progress)
    clip: nn.Module = text.clip
    return clip


def untrained(modality: str, part: str, **files: str) -> Any:
    """A part as `conf/model/tiny.yaml` describes it, with random weights unless `files` names some."""
    config: Any = OmegaConf.to_container(OmegaConf.load(config_folder() / "model" / "tiny.yaml"))
    arguments = config["modalities"][modality][part] | {"weights": None} | files
    return instantiate(arguments, f"model.modalities.{modality}.{part}")


def save(part: nn.Module, file: Path) -> None:
    """Write a part's weights in half precision; loading converts them to the model's precision."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in untied(part).items()}
    with atomic_write(file) as draft:
        save_file(state, draft)


if __name__ == "__main__":
    main()
