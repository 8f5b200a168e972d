"""The stream of a stage's phase, as its configuration describes it."""

from __future__ import annotations

from pathlib import Path

from vdtrain.config import TrainConfig
from vdtrain.data.batch import BatchStream
from vdtrain.instantiate import instantiate
from vdtrain.system_errors import said


def open_stream(config: TrainConfig, phase: int, *, rank: int, world_size: int, step: int = 0) -> BatchStream:
    """The batches of a process from a step of a phase on.

    Args:
        phase: number of the phase; each has a data order of its own, the same in every stage.

    Raises:
        ConfigError, ManifestError, StreamError, OSError: the data are not there, or not as the settings want them.
    """
    stage, data = config.stage, config.data
    # Only asked of a stream where it is wanted: others than PairStream need not know of it.
    cached = {"latents": data.latent_cache.folder} if data.latents == "cached" else {}
    stream: BatchStream = instantiate(
        data.stream,
        "data.stream",
        manifest=Path(data.manifest),
        seed=config.seed + phase,
        resolution=stage.phases[phase].resolution,
        global_batch_size=stage.global_batch_size,
        rank=rank,
        world_size=world_size,
        start=step * stage.global_batch_size,
        workers=config.hardware.loader_workers,
        **cached,
    )
    return stream


def data_problem(error: Exception, manifest: str) -> str:
    """What an error of `open_stream`, or of its batches, says in a line."""
    if isinstance(error, OSError):
        return f"data.manifest={manifest}: {said(error)}"
    return " ".join(str(error).split())
