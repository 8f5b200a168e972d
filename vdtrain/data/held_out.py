"""Which pairs are held out of training: a hash of each pair's name decides, in every stream and on every machine alike.

The name is the file name of the pair's tar and the pair's key there. Folders and addresses do not count, so that
shards may move.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vdtrain.data.manifest import Manifest, ShardRows

# The file name of a tar in a path, an address with a query, or a command.
TAR_NAME = re.compile(r"[^/\s?#]+\.tar(?:\.\w+)?(?=$|[\s?#])")
THREADS = 4


def is_held_out(name: str, share: float) -> bool:
    """Whether the pair of this name takes no part in training.

    Args:
        name: see `pair_name`.
        share: of all pairs that is held out, from 0 to 1. The pairs of a smaller share are among those of a larger one.
    """
    digest = hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def pair_name(tar: str, key: str) -> str:
    """The name of a pair, from the path or address of its tar and its key there."""
    found = TAR_NAME.findall(tar)
    return f"{found[-1] if found else tar.rpartition('/')[2]}/{key}"


@dataclass(frozen=True)
class Split:
    """One side of the split of a set's pairs.

    Attributes:
        share: of the pairs that is held out; 0 splits nothing.
        held_out: the held-out pairs, instead of those to train on.
    """

    share: float = 0.0
    held_out: bool = False

    def takes(self, tar: str, keys: Sequence[str]) -> NDArray[np.bool_]:
        """[n] Whether the pairs with these keys in a tar are on this side."""
        if self.share == 0:
            return np.ones(len(keys), np.bool_)
        prefix = pair_name(tar, "")
        held = np.fromiter((is_held_out(prefix + key, self.share) for key in keys), np.bool_, len(keys))
        return held if self.held_out else ~held

    def rows(
        self, tar: str, rows: ShardRows, min_side: int, partial: bool = False, need: Sequence[str] = ()
    ) -> NDArray[np.int64]:
        """Numbers of a shard's rows on this side whose shortest side has `min_side` pixels or more.

        Args:
            partial: also samples that lack their image or their caption.
            need: modalities that a sample must have nevertheless.
        """
        taken = (rows.side >= max(1, min_side)) | (partial & (rows.side == 0))
        for modality in need:
            taken &= rows.has(modality)
        large = np.flatnonzero(taken)
        return large if self.share == 0 else large[self.takes(tar, rows.keys.take(large).to_pylist())]

    def counts(
        self, manifest: Manifest, min_side: int, partial: bool = False, need: Sequence[str] = ()
    ) -> NDArray[np.int64]:
        """int64 [S]: number of `rows` of each shard. A split, or a need, reads the rows of all shards, once.

        Raises:
            ManifestError: they are missing or damaged.
        """
        found = manifest.counts(min_side)
        if partial:
            found += manifest.partial()
        if self.share == 0 and not need:
            return found

        def count(shard: int) -> int:
            return len(self.rows(manifest.paths[shard], manifest.rows(shard), min_side, partial, need))

        shards = np.flatnonzero(found)
        with ThreadPoolExecutor(THREADS) as pool:
            found[shards] = list(pool.map(count, shards.tolist()))
        return found
