"""The next batch made ready while a step computes: what its samples need of the CPU alone is done beside training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from vdtrain.data.batch import Batch, BatchStream


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
