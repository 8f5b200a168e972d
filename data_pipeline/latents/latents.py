"""Encode the images of a manifest once, for training with `data.latents=cached`.

python -m data_pipeline latents                                             # one process
python -m data_pipeline latents hardware=h100 gpus=8          # one process per GPU; srun and torchrun start them too
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from vdtrain.config.command_schema import LatentsConfig
from vdtrain.config.instantiate import instantiate
from vdtrain.config.validation import check_indexed, check_resolution, latent_encoder
from vdtrain.data.latents import DESCRIPTION_FILE, MODALITY, LatentDescription, LatentFolder
from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.data.shards import ShardReader
from vdtrain.errors import ConfigError, one_line, unwritable
from vdtrain.files import atomic_write, check_output
from vdtrain.run.ranks import PROCESSES, run_command_on_ranks
from vdtrain.run.signals import ending
from vdtrain.storage.patience import Patience, StreamError, patience_of

if TYPE_CHECKING:
    from data_pipeline.latents.encoding import Encoder, Made
    from vdtrain.run.watchdog import Watchdog

USAGE = """\
Usage: python -m data_pipeline latents [GROUP=OPTION ...] [SETTING=VALUE ...]

Encode every image of the manifest once with the model's image VAE. Training with data.latents=cached then runs without
the encoder. gpus=N shares the work among N processes, one on each GPU, as srun and torchrun do: each encodes a fixed
share of the shards. Run the same command again after an interruption, or with new shards: it encodes what is missing.

Examples:
  python -m data_pipeline latents data.latent_cache.resolutions=[256]
  python -m data_pipeline latents gpus=8 hardware=h100 data.latent_cache.folder=/scratch/latents
  python -m data_pipeline latents model=tiny data=shapes hardware=cpu
"""

# The settings that it reads.
PARTS = (
    *PROCESSES,
    *("data.root", "data.manifest", "data.stream", "data.latent_cache", "model.modalities"),
    "watchdog_seconds",
    *("hardware.device", "hardware.precision", "hardware.loader_workers", "hardware.threads"),
)


FAILED = 1
# A share may take days, and shares differ.
TIMEOUT_SECONDS = 7 * 24 * 3600.0


def make_latents(config: LatentsConfig, launch: Mapping[str, str], watchdog: Watchdog) -> None:
    """Encode this process's share of what is missing, for every resolution, and wait for the other processes.

    Raises:
        ConfigError: on every process, with the setting, its value and the remedy, in one line.
    """
    # Late, because it imports PyTorch.
    from vdtrain.run import distributed

    cached = config.data.latent_cache.folder
    check_output(Path(cached), f"data.latent_cache.folder={cached}")
    vae = _check(config)
    alone = launch["WORLD_SIZE"] == "1"
    try:
        if not alone:
            with watchdog.patient("joining the other processes"):
                distributed.start(config.hardware.device, TIMEOUT_SECONDS, control_only=True)
            distributed.watch(watchdog)
        watchdog.heartbeat("looking for what is missing")
        reader, failure = None, None
        try:
            reader = _reader(config, vae)
        except (ConfigError, ManifestError, StreamError, OSError) as error:
            failure = _said(error, cached)
        distributed.raise_if_any(failure)
        assert reader is not None
        try:
            _encode(config, launch, vae, reader, watchdog)
        except (ConfigError, ManifestError, StreamError, OSError) as error:
            if alone:
                raise ConfigError(_said(error, cached)) from error
            ending.check()
            print(f"error: process {launch['RANK']}: {_said(error, cached)}", file=sys.stderr, flush=True)
            # A regular exit would wait for the other processes.
            sys.stdout.flush()
            os._exit(FAILED)
        finally:
            reader.close()
        watchdog.heartbeat("waiting for the other processes")
        with distributed.following(watchdog):
            distributed.barrier()
    except (distributed.SharedError, ValueError) as error:
        raise ConfigError(str(error)) from error
    finally:
        distributed.finish()


def _said(error: Exception, cached: str) -> str:
    if isinstance(error, OSError):
        return f"data.latent_cache.folder={cached}: {unwritable(error, Path(cached))}"
    return one_line(error)


def _reader(config: LatentsConfig, vae: str) -> ShardReader:
    """The reader of the shards, if their latents can be made."""
    settings, stream = config.data.latent_cache, config.data.stream
    asked = {name: stream[name] for name in ("shard_root", "follow", "cache", "timeout") if name in stream}
    patience = Patience(patience_of(config.watchdog_seconds))
    reader = ShardReader.open(Path(config.data.manifest), patience=patience, **asked)
    for resolution in settings.resolutions:
        _refuse_other(LatentFolder(settings.folder, resolution), vae, config)
        min_side = stream.get("min_side") or resolution
        if reader.manifest.counts(min_side).sum() == 0:
            raise ConfigError(
                f"data.manifest={config.data.manifest}: no image has a side of {min_side} pixels or more; take "
                f"{resolution} out of data.latent_cache.resolutions"
            )
    return reader


def _encode(
    config: LatentsConfig, launch: Mapping[str, str], vae: str, reader: ShardReader, watchdog: Watchdog
) -> None:
    """Encode this process's share."""
    # Late, because it imports PyTorch.
    from data_pipeline.latents.encoding import LatentEncoding

    settings = config.data.latent_cache
    encode, shape_of = _encoder(config, int(launch["LOCAL_RANK"]))
    for resolution in settings.resolutions:
        folder = LatentFolder(settings.folder, resolution)
        min_side, precision = config.data.stream.get("min_side") or resolution, config.hardware.precision
        description = LatentDescription(resolution, min_side, shape_of[resolution], vae, precision)
        if not (path := folder.path / DESCRIPTION_FILE).exists():
            folder.path.mkdir(parents=True, exist_ok=True)
            # All processes write the same.
            with atomic_write(path) as draft:
                draft.write_text(json.dumps(description.to_dict(), indent=2) + "\n", encoding="utf-8")
        watchdog.heartbeat(f"encoding at {resolution} pixels")
        made = LatentEncoding(
            folder,
            reader,
            description,
            encode,
            batch_size=settings.batch_size,
            workers=config.hardware.loader_workers,
            rank=int(launch["RANK"]),
            world_size=int(launch["WORLD_SIZE"]),
            heartbeat=watchdog.heartbeat,
        ).run()
        if launch["RANK"] == "0":
            print(_summary(folder, reader.manifest, description, made), flush=True)


def _check(config: LatentsConfig) -> str:
    """Refuse settings that cannot work; returns the encoder's fingerprint."""
    settings = config.data.latent_cache
    check_indexed(config.data, "cached latents belong to")
    if not settings.resolutions:
        raise ConfigError("data.latent_cache.resolutions=[]: empty; name those of the stage's phases")
    for resolution in settings.resolutions:
        check_resolution("data.latent_cache.resolutions", resolution, config.model)
    return latent_encoder(config.model, MODALITY)


def _refuse_other(folder: LatentFolder, vae: str, config: LatentsConfig) -> None:
    """Raise a ConfigError if the folder has latents that were made with other settings."""
    found = folder.description()
    if found is None:
        return
    for name, built, asked in (
        ("vae", found.vae, vae),
        ("precision", found.precision, config.hardware.precision),
        ("min_side", found.min_side, config.data.stream.get("min_side") or found.resolution),
    ):
        if built != asked:
            raise ConfigError(
                f"{folder.setting}: {folder.path} was built with {name}={built}, but this run asks for {name}={asked}; "
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
        # Contiguous, as in training.
        moments: torch.Tensor = vae.moments(images.to(device, non_blocking=True).contiguous())
        return moments

    shapes: dict[int, tuple[int, ...]] = {}
    for resolution in config.data.latent_cache.resolutions:
        channels, height, width = vae.latent_shape((resolution, resolution))
        shapes[resolution] = (2 * channels, height, width)
    return encode, shapes


def _summary(folder: LatentFolder, manifest: Manifest, description: LatentDescription, made: Made) -> str:
    counts = manifest.counts(description.min_side)
    size = int(counts.sum()) * 2 * prod(description.shape)
    missing = len(folder.missing(manifest, description.min_side))
    bad = f", {made.bad:,} of them bad" if made.bad else ""
    rate = f", {made.images / made.seconds:,.0f} images/s" if made.images else ""
    return (
        f"{folder.path}: {counts.sum():,} latents of {(counts > 0).sum():,} shards, {size / 1e6:,.1f} MB, {missing:,} "
        f"shards missing; this process encoded {made.images:,} images{bad} of {made.shards:,} shards in "
        f"{timedelta(seconds=round(made.seconds))}{rate}"
    )


def main(argv: Sequence[str]) -> int:
    """Entry point of `python -m data_pipeline latents`; returns its exit status."""

    def action(config: LatentsConfig, raw_config: DictConfig, launch: dict[str, str]) -> int:
        # Late, because it imports PyTorch.
        from vdtrain.run.watchdog import DUMPS, Watchdog

        folder = Path(config.data.latent_cache.folder) / DUMPS
        watchdog = Watchdog(config.watchdog_seconds, folder, int(launch["RANK"]))
        try:
            make_latents(config, launch, watchdog)
        finally:
            watchdog.close()
        return 0

    return run_command_on_ranks(USAGE, "latents", LatentsConfig, action, argv, parts=PARTS, command="data latents")
