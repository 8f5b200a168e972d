"""The next batch made ready while a step computes: what its samples need of the CPU alone is done beside training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from vdtrain.config.instantiate import instantiate
from vdtrain.config.schema import TrainConfig
from vdtrain.data.batch import Batch, BatchStream
from vdtrain.errors import described, one_line


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
        return f"data.manifest={manifest}: {described(error)}"
    return one_line(error)


class Prefetcher:
    """Yields a stream's batches with their samples prepared, one batch ahead, and owns the stream.

    Args:
        prepare: from samples by modality to what takes their place, such as captions to token ids; it is called on a
            thread, and must not touch the accelerator.
    """

    def __init__(self, stream: BatchStream, prepare: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self._stream, self._prepare = stream, prepare
        self._batches: Iterator[Batch] = iter(stream)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._next: Future[Batch] = self._pool.submit(self._make)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. An error of the stream is raised when its batch is asked for."""
        batch = self._next.result()
        self._next = self._pool.submit(self._make)
        return batch

    def close(self) -> None:
        """Stop the thread and close the stream."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stream.close()

    def _make(self) -> Batch:
        batch = next(self._batches)
        return replace(batch, samples=self._prepare(batch.samples))
