"""Counts the bytes of tensors that come to life and die while it is on, on any device, with memory or without."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """`with LiveMemory() as memory:` counts every storage that an operator creates inside, once, until it dies.

    What was there before does not count, nor do the buffers that a kernel uses within itself.

    Attributes:
        now: bytes alive.
        peak: the most that `now` has been.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # An output that shares an argument's storage is not new.
        self._meet((args, kwargs), new=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, new=True)
        return out

    def _meet(self, tensors: Any, new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self._sizes:
                continue
            self._sizes[id(storage)] = storage.nbytes() if new else 0
            weakref.finalize(storage, self._part, id(storage))
            self.now += self._sizes[id(storage)]
            self.peak = max(self.peak, self.now)

    def _part(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
