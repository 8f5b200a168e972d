"""Opens the stream of a phase, and prepares the next batch on a CPU thread while a step computes."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vdtrain.config.data_schema import DataConfig
from vdtrain.config.instantiate import find_target, instantiate, takes
from vdtrain.config.schema import TrainConfig
from vdtrain.data.batch import Batch, BatchStream
from vdtrain.data.order import Split
from vdtrain.errors import ConfigError, described, one_line
from vdtrain.storage.patience import Patience, patience_of


def open_stream(
    config: TrainConfig, phase: int, *, rank: int, world_size: int, step: int = 0, patience: float | None = None
) -> BatchStream:
    """The batches of a process, from a step of a phase.

    Args:
        phase: number of the phase; each number has its own data order, the same in every stage.
        patience: seconds for which a read is repeated whose error may pass; a share of `watchdog_seconds` by default.

    Raises:
        ConfigError, ManifestError, StreamError, OSError: the data are missing, or do not match the settings.
    """
    stage, data = config.stage, config.data
    # Streams other than PairStream need not take these arguments.
    own: dict[str, Any] = {"latents": data.latent_cache.folder} if data.latents == "cached" else {}
    own |= sources(config, held_out=False, patience=patience)
    stream: BatchStream = instantiate(
        data.stream,
        "data.stream",
        seed=config.seed + phase,
        resolution=stage.phases[phase].resolution,
        global_batch_size=stage.global_batch_size,
        rank=rank,
        world_size=world_size,
        start=step * stage.global_batch_size,
        workers=config.hardware.loader_workers,
        **own,
    )
    return stream


def sources(config: TrainConfig, held_out: bool, patience: float | None = None) -> dict[str, Any]:
    """The arguments of a stream that say which pairs take part, and how long a read may fail.

    Args:
        held_out: the pairs that are held out, if there are any, instead of those to train on.
        patience: in seconds; a share of `watchdog_seconds` by default.

    Raises:
        ConfigError: pairs are held out, and the stream cannot leave them out.
    """
    data, own = config.data, dict[str, Any]()
    if takes(data.stream, "data.stream", "manifest"):
        own["manifest"] = Path(data.manifest)
    if takes(data.stream, "data.stream", "patience"):
        own["patience"] = patience_of(config.watchdog_seconds) if patience is None else patience
    if share := data.validation.share:
        check_split(data)
        own["split"] = Split(share, held_out)
    return own


def check_split(data: DataConfig) -> None:
    """Raise a ConfigError if pairs are held out and the stream takes no `split`, by which it would leave them out."""
    if data.validation.share and not takes(data.stream, "data.stream", "split"):
        raise ConfigError(
            f"data.validation.share={data.validation.share}: {data.stream['_target_']} has no argument for the split, "
            "so it would train on the held-out pairs; set null, or use another data.stream"
        )


# What of `data.stream` makes way for every pair once, whole, at its centre.
PLAIN = {"random_crop": False, "weights": None, "latents": None, "prefetch": 0, "shuffle": 1}


def fixed_pairs(
    config: TrainConfig, resolution: int, count: int, rank: int = 0, world_size: int = 1
) -> tuple[Batch, list[int]]:
    """This rank's share of the first `count` held-out pairs, or of the data's first pairs if none are held out.

    They are the same at every resolution: all have a shortest side as large as the largest of the stage.

    Returns:
        The pairs, cropped at the centre, and their numbers among all, from 0.

    Raises:
        ConfigError, ManifestError, StreamError, OSError: the data are missing, or too few.
    """
    plain = {**PLAIN, "min_side": max(phase.resolution for phase in config.stage.phases)}
    # A class that hands on any argument may hand it to one that does not take it.
    known = {*config.data.stream, *inspect.signature(find_target(config.data.stream, "data.stream")[0]).parameters}
    given = {name: value for name, value in plain.items() if name in known}

    def opened(pairs: int) -> BatchStream:
        stream: BatchStream = instantiate(
            {**config.data.stream, **given},
            "data.stream",
            seed=config.seed,
            resolution=resolution,
            global_batch_size=-(-pairs // world_size) * world_size,
            rank=rank,
            world_size=world_size,
            start=0,
            workers=1,
            **sources(config, held_out=True),
        )
        return stream

    stream = opened(count)
    if isinstance(stream, Sized) and len(stream) < count:
        count = len(stream)
        stream.close()
        stream = opened(count)
    try:
        batch = next(iter(stream))
    finally:
        stream.close()
    order = torch.argsort(batch.positions)
    order = order[batch.positions[order] < count]
    return batch.take(order), batch.positions[order].tolist()


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
        change: of every batch before that, on the same thread.
    """

    def __init__(
        self,
        stream: BatchStream,
        prepare: Callable[[Mapping[str, Any]], dict[str, Any]],
        change: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self._stream, self._prepare, self._change = stream, prepare, change
        self._patience: Patience | None = getattr(stream, "patience", None)
        self._batches: Iterator[Batch] = iter(stream)
        self._closing: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._next: Future[Batch] = self._pool.submit(self._make)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. A stream's error is raised by the call that asks for its batch."""
        batch = self._next.result()
        self._next = self._pool.submit(self._make)
        return batch

    def ready(self, seconds: float) -> bool:
        """Whether the next batch, or its error, is there; waits for it for so long at most."""
        return not wait([self._next], seconds).not_done

    def slowest(self) -> str:
        """What the next batch waits for; empty if that is unknown."""
        return "" if self._patience is None else self._patience.slowest()

    def close(self, seconds: float | None = None) -> bool:
        """Stop the thread and close the stream.

        Args:
            seconds: how long to wait for reads that do not end; None waits until they end.

        Returns:
            Whether it is closed.
        """
        if self._closing is None:
            self._closing = threading.Thread(target=self._close, daemon=True)
            self._closing.start()
        self._closing.join(seconds)
        return not self._closing.is_alive()

    def _close(self) -> None:
        if self._patience is not None:
            self._patience.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stream.close()

    def _make(self) -> Batch:
        batch = next(self._batches)
        if self._change is not None:
            batch = self._change(batch)
        return replace(batch, samples=self._prepare(batch.samples))
