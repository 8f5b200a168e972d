"""The next batch is made ready beside training: order, errors and the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from vdtrain.data.batch import Batch
from vdtrain.data.loading import Prefetcher
from vdtrain.data.stream import StreamError


class Numbers:
    """A stream of one-sample batches 0, 1, ..., which fails at `bad`."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad, self.given, self.closed = bad, 0, False

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self.given == self.bad:
                raise StreamError("batch is bad")
            self.given += 1
            yield Batch({"text": [str(self.given - 1)]}, torch.tensor([self.given - 1]))

    def close(self) -> None:
        self.closed = True


def shout(samples: Mapping[str, Any]) -> dict[str, Any]:
    return {name: [f"{text}!" for text in texts] for name, texts in samples.items()}


def test_batches_come_prepared_and_in_order() -> None:
    stream = Numbers()
    batches = Prefetcher(stream, shout)
    for number in range(5):
        batch = next(batches)
        assert batch.samples == {"text": [f"{number}!"]}
        assert batch.positions.tolist() == [number]
    batches.close()
    assert stream.closed
    assert stream.given <= 6


def test_the_next_batch_is_made_while_this_one_is_used() -> None:
    second = threading.Event()

    def prepare(samples: Mapping[str, Any]) -> dict[str, Any]:
        if samples["text"] == ["1"]:
            second.set()
        return dict(samples)

    batches = Prefetcher(Numbers(), prepare)
    next(batches)
    assert second.wait(30)
    batches.close()


def test_an_error_comes_with_its_own_batch() -> None:
    batches = Prefetcher(Numbers(bad=2), shout)
    assert [next(batches).samples["text"] for _ in range(2)] == [["0!"], ["1!"]]
    with pytest.raises(StreamError, match="batch is bad"):
        next(batches)
    batches.close()
