"""Opens the stream of a phase, and prepares the next batch on a CPU thread while a step computes."""

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
    """The batches of a process, from a step of a phase.

    Args:
        phase: number of the phase; each number has its own data order, the same in every stage.

    Raises:
        ConfigError, ManifestError, StreamError, OSError: the data are missing, or do not match the settings.
    """
    stage, data = config.stage, config.data
    # Streams other than PairStream need not take this argument, so it is passed only if the setting asks for it.
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
    """The message of an error of `open_stream`, or of its batches, in one line."""
    if isinstance(error, OSError):
        return f"data.manifest={manifest}: {described(error)}"
    return one_line(error)


class Prefetcher:
    """Prepares a stream's batches one batch ahead; it owns the stream.

    Args:
        prepare: replaces samples by modality, for example captions by token ids. A thread calls it, so it must not use
            the accelerator.
    """

    def __init__(self, stream: BatchStream, prepare: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self._stream, self._prepare = stream, prepare
        self._batches: Iterator[Batch] = iter(stream)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._next: Future[Batch] = self._pool.submit(self._make)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. A stream's error is raised by the call that asks for its batch."""
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
