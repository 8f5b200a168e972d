"""Batches of image-text pairs straight from tars at addresses, without an index: a stream of the webdataset library.

Each decoding thread of each process reads tars of its own from their beginning to their end and draws its samples from
a buffer. Nothing in a tar is unpickled, and no command is run unless `pipe` allows it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np

from vdtrain.config.fields import About
from vdtrain.data.batch import Batch, BatchMemory
from vdtrain.data.decode import CENTRE, DecodeError, decode_into, image_size
from vdtrain.data.order import Split
from vdtrain.data.stream import BAD_ALLOWANCE, LOGGED, _Loading
from vdtrain.data.tar_samples import CutError, Sample, samples
from vdtrain.errors import ConfigError, missing, one_line, passes, unreadable
from vdtrain.redaction import without_secrets
from vdtrain.storage.addresses import Command, expanded, open_tar
from vdtrain.storage.patience import PATIENCE_SECONDS, Patience, StreamError, warn

PROMISES = (
    "data.stream=webdataset: no index is read. A resumed run goes on with other samples, a sample may come twice or "
    "not at all in an epoch, and the order depends on the number of processes and threads. data.stream=indexed "
    "promises more"
)
# Tars that preflight opens.
PROBED = 4
# Samples in the buffer before the first is drawn from it.
FIRST_SAMPLES = 100


class WebDatasetStream:
    """Image-text pairs, {"image": uint8 [b, 3, R, R], "text": b captions}; a `BatchStream` of weaker promises.

    Args:
        urls: addresses of tars (`vdtrain.storage.addresses`).
        seed, resolution, global_batch_size, rank, world_size, workers, prefetch, random_crop: as of `PairStream`.
        start: position of the first pair. A stream from another position has another order.
        caption: field of the json member that has the caption; None for the txt member, or else `caption` or `text`.
        pipe: whether an address may be a command, `pipe:COMMAND`.
        shuffle: encoded samples that a process keeps and draws from.
        min_side: images with a shorter side are left out; the resolution by default.
        bad_share: the stream stops if a larger share of samples cannot be decoded. Another sample replaces each. Also
            the share of tars that may be cut or unreadable, beyond ten.
        timeout: seconds without a byte from a server.
        split: which side of the split into held-out pairs and the others is yielded (`vdtrain.data.order`).
        patience: seconds for which a read is repeated whose error may pass. If other reads succeed meanwhile, its tar
            is passed over.

    Raises:
        ConfigError: an address or another argument is invalid.
        StreamError: while iterating, if too many samples are bad, or no tar has any.
    """

    def __init__(
        self,
        *,
        urls: Sequence[str],
        seed: int,
        resolution: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        workers: int = 2,
        prefetch: int = 2,
        caption: str | None = None,
        pipe: bool = False,
        shuffle: int = 4000,
        min_side: int | None = None,
        random_crop: bool = True,
        bad_share: float = 0.01,
        timeout: float = 30.0,
        split: Split | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        if global_batch_size % world_size or start % global_batch_size:
            raise ValueError(f"batch {global_batch_size}, {world_size} ranks, start {start}: must divide evenly")
        self.urls = self.check(
            urls=urls, pipe=pipe, caption=caption, shuffle=shuffle, bad_share=bad_share, timeout=timeout
        )
        self.resolution, self.min_side = resolution, resolution if min_side is None else min_side
        self.split = split or Split()
        self.random_crop, self.bad_share, self.caption, self.timeout = random_crop, bad_share, caption, timeout
        self.patience = Patience(patience)
        self.seed, self.start, self.prefetch = f"{seed} {start}", start, prefetch
        self.global_batch_size, self.local_batch_size = global_batch_size, global_batch_size // world_size
        self.rank, self.world_size = rank, world_size
        # No tar is read by two threads, if there are enough for the processes.
        threads = max(1, min(workers, self.local_batch_size, len(self.urls) // world_size))
        self.remarks = [PROMISES, *self._sharing(workers, threads)]
        self.bad: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self._lost: set[str] = set()
        self._open: set[Any] = set()
        self._good = 0
        self._lock, self._closed, self._memory = Lock(), Event(), BatchMemory()
        self._next_batch = start // global_batch_size
        self._pending: deque[_Loading] = deque()
        readers = range(rank * threads, (rank + 1) * threads)
        self._readers = [_Reader(self, number, threads * world_size, shuffle // threads) for number in readers]

    @staticmethod
    def check(
        *,
        urls: Sequence[str],
        pipe: bool = False,
        caption: str | None = None,
        shuffle: int = 4000,
        bad_share: float = 0.01,
        timeout: float = 30.0,
        **_: Any,
    ) -> list[str]:
        """The addresses of the tars, without a look at them; a ConfigError if the settings cannot work."""
        if (problem := missing("webdataset")) is not None:
            raise ConfigError(f"data.stream=webdataset: {problem}")
        if not isinstance(pipe, bool):
            raise ConfigError(f"data.stream.pipe={pipe}: must be true or false")
        if not isinstance(caption, str | None):
            raise ConfigError(f"data.stream.caption={caption}: must be the name of a field, or null")
        for name, value, limits in (
            ("shuffle", shuffle, About(least=1)),
            ("bad_share", bad_share, About(least=0, most=1)),
            ("timeout", timeout, About(above=0)),
        ):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if (wrong := limits.problem(value) if number else "must be a number") is not None:
                raise ConfigError(f"data.stream.{name}={value}: {wrong}")
        return expanded([urls] if isinstance(urls, str) else urls, pipe)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            while len(self._pending) <= self.prefetch:
                self._pending.append(self._begin())
            yield self._pending.popleft().result()

    def close(self) -> None:
        """Stop the threads and close the tars."""
        self._closed.set()
        self.patience.close()
        for file in list(self._open):
            if isinstance(file, Command):
                file.kill()
        for reader in self._readers:
            reader.close()

    def probe(self) -> Iterator[str]:
        """A line on each tar, of a few, that cannot be read."""
        for address in self.urls[:: -(-len(self.urls) // PROBED)]:
            try:
                for _ in self.read(address, Counter()):
                    break
            except (CutError, StreamError, OSError) as error:
                yield _line(address, error)

    def read(self, address: str, left_out: Counter[str]) -> Iterator[Sample]:
        """The samples of a tar; its error comes after the samples before the damage: CutError, OSError, StreamError."""
        file = open_tar(address, self.timeout, self.patience)
        self._open.add(file)
        asked: tuple[type[OSError], ...] = ()
        try:
            yield from samples(file, self.caption, left_out)
        except GeneratorExit:
            asked = (OSError,)
            raise
        finally:
            self._open.discard(file)
            # A command that has failed says so now, which tells more than that the tar has no end.
            with suppress(*asked):
                file.close()

    def count_good(self) -> None:
        """Count a sample that was decoded."""
        with self._lock:
            self._good += 1

    def count_bad(self, reason: str, name: str) -> None:
        """Count a sample that cannot be decoded, named by place and reason; a StreamError if too many are bad."""
        with self._lock:
            self.bad[reason] += 1
            total = self.bad.total()
        if total <= LOGGED:
            warn(f"bad sample, replaced: {name}")
        if total > BAD_ALLOWANCE + self.bad_share * self._good:
            raise StreamError(
                f"{total} samples were bad ({_counts(self.bad)}; the last: {name}) and {self._good:,} good, above "
                f"data.stream.bad_share={self.bad_share:g}; raise it, or repair the tars"
            )

    def count_left_out(self, counts: Mapping[str, int]) -> None:
        """Count samples that are not whole or too small, and print a line whenever there are ten times as many."""
        with self._lock:
            before = self.left_out.total()
            self.left_out.update(counts)
            now = self.left_out.total()
        if now and (before == 0 or len(str(now)) > len(str(before))):
            warn(f"samples left out until now: {_counts(self.left_out)}; taken: {self._good:,}")

    def lose(self, address: str, error: Exception) -> None:
        """Pass over the rest of a tar that is cut or unreadable; a StreamError if there are too many such tars."""
        if address in self._lost:
            return
        self._lost.add(address)
        warn(f"{_line(address, error)}; its other samples are passed over")
        if isinstance(error, CutError) and not error.lost:
            return
        if len(self._lost) > BAD_ALLOWANCE + self.bad_share * len(self.urls):
            raise StreamError(
                f"{len(self._lost)} of {len(self.urls):,} tars are cut or cannot be read, above data.stream.bad_share="
                f"{self.bad_share:g}; the last: {_line(address, error)}"
            )

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def _sharing(self, workers: int, threads: int) -> list[str]:
        count, needed = len(self.urls), workers * self.world_size
        if count >= needed:
            return []
        if count < self.world_size:
            shared = f"one thread each, and up to {-(-self.world_size // count)} processes read the same tar"
        else:
            shared = f"{threads} threads each"
        return [
            f"data.urls: {count} tars for {self.world_size} processes x hardware.loader_workers={workers}: {shared}; "
            "more and smaller tars are read faster"
        ]

    def _begin(self) -> _Loading:
        first = self._next_batch * self.global_batch_size + self.rank * self.local_batch_size
        self._next_batch += 1
        positions = np.arange(first, first + self.local_batch_size, dtype=np.int64)
        loading = _Loading(self._memory, positions, self.resolution, None)
        count = len(self._readers)
        loading.chunks += [
            reader.pool.submit(reader.fill, loading, range(number, self.local_batch_size, count))
            for number, reader in enumerate(self._readers)
        ]
        return loading


class _Reader:
    """A thread with tars of its own.

    Args:
        number: of this reader, of `readers` of all processes.
        buffer: samples that it keeps and draws from.
    """

    def __init__(self, stream: WebDatasetStream, number: int, readers: int, buffer: int) -> None:
        self._stream, self._number, self._readers, self._buffer = stream, number, readers, max(1, buffer)
        self._random = random.Random(f"{stream.seed} {number}")
        self._samples = self._drawn()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self._samples.close()

    def fill(self, loading: _Loading, rows: range) -> None:
        """Fill rows of a batch, in this reader's thread."""
        for row in rows:
            for sample in self._samples:
                crop = (self._random.random(), self._random.random()) if self._stream.random_crop else CENTRE
                try:
                    decode_into(loading.arrays[row], sample.image, crop, sample.orientation)
                except DecodeError as error:
                    loading.replaced.append(error.reason)
                    self._stream.count_bad(error.reason, f"{sample.tar}, key {sample.key} ({one_line(error)})")
                    continue
                loading.captions[row] = sample.caption
                loading.names[row] = f"{without_secrets(sample.tar).removesuffix('.tar')}/{sample.key}"
                self._stream.count_good()
                break
            else:
                raise StreamError("the stream was closed")

    def _drawn(self) -> Generator[Sample]:
        """The samples of pass after pass over the tars, each pass shuffled."""
        from webdataset.filters import shuffle

        first = min(FIRST_SAMPLES, self._buffer)
        mix = shuffle(self._buffer, initial=first, rng=self._random)
        # Tars without a sample since the last that had one.
        barren: dict[str, str] = {}
        number = 0
        split, drawn = self._stream.split, 0
        while not self._stream.closed:
            for sample in mix(self._pass(number, barren)):
                drawn += 1
                yield sample
            number += 1
            if not drawn and split.share > 0:
                side, remedy = ("none", "raise") if split.held_out else ("each", "lower")
                raise StreamError(
                    f"data.validation.share={split.share}: {side} of the pairs read is held out; {remedy} it"
                )

    def _pass(self, number: int, barren: dict[str, str]) -> Iterator[Sample]:
        """This reader's samples of one pass over all tars."""
        for address, part, parts in self._share(number):
            taken = others = 0
            left_out: Counter[str] = Counter()
            failure = "no samples"
            try:
                for place, sample in enumerate(self._stream.read(address, left_out)):
                    if self._stream.closed:
                        return
                    if (place + number) % parts != part or not self._stream.split.takes(address, [sample.key])[0]:
                        others += 1
                    elif self._large(sample, left_out):
                        taken += 1
                        yield replace(sample, tar=without_secrets(address))
            except (CutError, StreamError, OSError) as error:
                if self._stream.closed:
                    return
                if passes(error) and not getattr(error, "alone", False):
                    # Nothing else can be read either.
                    raise
                failure = _line(address, error)
                self._stream.lose(address, error)
            self._stream.count_left_out(left_out)
            if taken:
                barren.clear()
            elif not others:
                barren[address] = f"{without_secrets(address)}: left out {_counts(left_out)}" if left_out else failure
                if len(barren) >= min(BAD_ALLOWANCE, len(self._stream.urls)):
                    raise StreamError(f"data.urls: {len(barren)} tars without one usable sample; {barren[address]}")

    def _share(self, number: int) -> Iterator[tuple[str, int, int]]:
        """This reader's tars in a pass, each with the part of its samples to take, of how many parts."""
        urls = list(self._stream.urls)
        # The same order in every process.
        random.Random(f"{self._stream.seed} pass {number}").shuffle(urls)
        own, readers, count = self._number, self._readers, len(urls)
        if count >= readers:
            yield from ((url, 0, 1) for url in urls[own::readers])
        else:
            yield urls[own % count], own // count, len(range(own % count, readers, count))

    def _large(self, sample: Sample, left_out: Counter[str]) -> bool:
        """Whether an image is large enough; one without a size goes on, and decoding says why."""
        with suppress(DecodeError):
            if min(image_size(sample.image)) < self._stream.min_side:
                left_out[f"smaller than {self._stream.min_side} pixels"] += 1
                return False
        return True


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in counts.items())


def _line(address: str, error: Exception) -> str:
    address = without_secrets(address)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{address}: {unreadable(error, Path(address), 'see that it can be read')}"
    reason = one_line(error)
    return reason if reason.startswith(address) else f"{address}: {reason}"
