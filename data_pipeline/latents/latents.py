"""Encode the images of a manifest once, for training with `data.latents=cached`.

python -m data_pipeline latents                                             # one process
torchrun --nproc-per-node=8 -m data_pipeline latents hardware=h100          # one process per GPU; srun does the same
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from vdtrain.config.compose import ConfigError
from vdtrain.config.instantiate import instantiate
from vdtrain.config.schema import LatentsConfig
from vdtrain.config.validation import check_resolution, latent_encoder
from vdtrain.data.latents import DESCRIPTION_FILE, MODALITY, LatentDescription, LatentFolder
from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.errors import one_line, unwritable
from vdtrain.files import check_output, sync, write_text
from vdtrain.run.launch import run_command_on_ranks

if TYPE_CHECKING:
    from data_pipeline.latents.encoding import Encoder, Made

USAGE = """\
Usage: python -m data_pipeline latents [GROUP=OPTION ...] [SETTING=VALUE ...]
       torchrun --nproc-per-node=N -m data_pipeline latents ...

Encode every image of the manifest with the model's image VAE, and keep the moments beside the shards: training with
data.latents=cached then leaves the encoder out. Any number of processes share the work, started by torchrun or srun.
What is there already is passed over: after an interruption, or with new shards, run the same command again.

Examples:
  python -m data_pipeline latents data.latent_cache.resolutions=[256]
  torchrun --nproc-per-node=8 -m data_pipeline latents hardware=h100 data.latent_cache.folder=/scratch/latents
  python -m data_pipeline latents model=tiny data=shapes hardware=cpu
"""

# The settings that it reads.
PARTS = (
    *("data.root", "data.manifest", "data.stream", "data.latent_cache", "model.modalities"),
    *("hardware.device", "hardware.precision", "hardware.loader_workers", "hardware.threads"),
)


def make_latents(config: LatentsConfig, launch: dict[str, str]) -> None:
    """Make what is missing of the latents of every resolution.

    Raises:
        ConfigError: with the setting, its value and the remedy, in one line.
    """
    cached = config.data.latent_cache.folder
    check_output(Path(cached), f"data.latent_cache.folder={cached}")
    vae = _check(config)
    stream, place = config.data.stream, f"data.manifest={config.data.manifest}"
    try:
        manifest = Manifest(Path(config.data.manifest), stream.get("shard_root"))
        folders = [LatentFolder(config.data.latent_cache.folder, side) for side in config.data.latent_cache.resolutions]
        before = [folder.description() for folder in folders]
    except ManifestError as error:
        raise ConfigError(one_line(error)) from error
    for folder, found in zip(folders, before, strict=True):
        _refuse_other(folder, found, vae, config)
    for resolution in config.data.latent_cache.resolutions:
        min_side = stream.get("min_side") or resolution
        if manifest.counts(min_side).sum() == 0:
            raise ConfigError(
                f"{place}: no image has a side of {min_side} pixels or more; take {resolution} out of "
                "data.latent_cache.resolutions"
            )

    # Late, for they import PyTorch.
    from data_pipeline.latents.encoding import LatentEncoding
    from vdtrain.data.shards import ShardCache, ShardReader, StreamError

    cache = stream.get("cache")
    try:
        encode, shape_of = _encoder(config, int(launch["LOCAL_RANK"]))
        reader = ShardReader(manifest, ShardCache(**cache) if cache is not None else None)
    except ManifestError as error:
        raise ConfigError(one_line(error)) from error
    try:
        for folder, resolution in zip(folders, config.data.latent_cache.resolutions, strict=True):
            description = LatentDescription(
                resolution,
                stream.get("min_side") or resolution,
                shape_of[resolution],
                vae,
                config.hardware.precision,
            )
            _describe(folder, description)
            made = LatentEncoding(
                folder,
                manifest,
                reader,
                description,
                encode,
                batch_size=config.data.latent_cache.batch_size,
                workers=config.hardware.loader_workers,
                rank=int(launch["RANK"]),
                world_size=int(launch["WORLD_SIZE"]),
            ).run()
            if launch["RANK"] == "0":
                print(_summary(folder, manifest, description, made), flush=True)
    except (StreamError, ManifestError) as error:
        raise ConfigError(one_line(error)) from error
    except OSError as error:
        cache = config.data.latent_cache.folder
        raise ConfigError(f"data.latent_cache.folder={cache}: {unwritable(error, Path(cache))}") from error
    finally:
        reader.close()


def _check(config: LatentsConfig) -> str:
    """Refuse settings that cannot work; the encoder's fingerprint."""
    settings = config.data.latent_cache
    if not settings.resolutions:
        raise ConfigError("data.latent_cache.resolutions=[]: empty; name those of the stage's phases")
    for resolution in settings.resolutions:
        check_resolution("data.latent_cache.resolutions", resolution, config.model)
    return latent_encoder(config.model, MODALITY)


def _refuse_other(folder: LatentFolder, found: LatentDescription | None, vae: str, config: LatentsConfig) -> None:
    """Raise a ConfigError where the folder has latents that would not go with those to be made."""
    if found is None:
        return
    for name, is_there, wanted in (
        ("of the VAE", found.vae, vae),
        ("in the precision", found.precision, config.hardware.precision),
        ("of images from a side on of", found.min_side, config.data.stream.get("min_side") or found.resolution),
    ):
        if is_there != wanted:
            raise ConfigError(
                f"{folder.setting}: {folder.path} has latents {name} {is_there}, and these would be {name} {wanted}; "
                f"give another folder, or remove {folder.path}"
            )


def _encoder(config: LatentsConfig, local_rank: int) -> tuple[Encoder, dict[int, tuple[int, ...]]]:
    """The VAE's encoder on this process's device, and the shape of its moments by resolution."""
    import torch

    from vdtrain.models.frozen_weights import freeze
    from vdtrain.run.distributed import local_device

    hardware = config.hardware
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    try:
        device = local_device(hardware.device, local_rank)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    vae = instantiate(config.model.modalities[MODALITY].vae, f"model.modalities.{MODALITY}.vae")
    freeze(vae)
    vae.to(device, torch.bfloat16 if hardware.precision == "bf16" else torch.float32)

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        # As the trainer hands its images over.
        moments: torch.Tensor = vae.moments(images.to(device, non_blocking=True).contiguous())
        return moments

    shapes: dict[int, tuple[int, ...]] = {}
    for resolution in config.data.latent_cache.resolutions:
        channels, height, width = vae.latent_shape((resolution, resolution))
        shapes[resolution] = (2 * channels, height, width)
    return encode, shapes


def _describe(folder: LatentFolder, description: LatentDescription) -> None:
    """Write down what the files of the folder have in common; all processes write the same."""
    path = folder.path / DESCRIPTION_FILE
    if path.exists():
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    write_text(draft, json.dumps(description.to_dict(), indent=2) + "\n")
    draft.replace(path)
    sync(folder.path)


def _summary(folder: LatentFolder, manifest: Manifest, description: LatentDescription, made: Made) -> str:
    counts = manifest.counts(description.min_side)
    latents = int(counts.sum())
    size = latents * 2 * prod(description.shape)
    bad = f", {made.bad:,} of them bad" if made.bad else ""
    rate = f", {made.images / made.seconds:,.0f} images/s" if made.images else ""
    return (
        f"{folder.path}: {latents:,} latents of {int((counts > 0).sum()):,} shards, {size / 1e6:,.1f} MB; by this "
        f"process {made.images:,} images{bad} of {made.shards:,} shards in "
        f"{timedelta(seconds=round(made.seconds))}{rate}"
    )


def main(argv: Sequence[str]) -> int:
    """Entry point of `python -m data_pipeline latents`; returns its exit status."""

    def action(config: LatentsConfig, raw_config: DictConfig, launch: dict[str, str]) -> int:
        make_latents(config, launch)
        return 0

    return run_command_on_ranks(USAGE, "latents", LatentsConfig, action, argv, parts=PARTS)
