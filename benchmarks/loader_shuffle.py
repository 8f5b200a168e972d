"""How well orders shuffle, from the numbers alone: part of benchmarks/loader.py.

An epoch of 1,000 shards of 1,000 samples in the order of vdtrain's stream, of a full permutation, of WebDataset's shard
shuffle with a buffer of 5,000, and of Streaming's py1e. Neighbours that share a shard share what the shard shares.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vdtrain.data.order import Order

SHARDS, SAMPLES = 1000, 1000
BATCHES = (512, 2048)
STREAMING = """
import json, numpy
from streaming.base.shuffle import get_shuffle
# The block that StreamingDataset takes by default on one node.
ids = get_shuffle("py1e", numpy.full({shards}, {samples}), 1, 0, 0, 4_000_000)
print("SHARDS " + json.dumps((ids // {samples}).tolist()))
"""


def vdtrain_order() -> NDArray[np.int64]:
    pool = np.arange(SHARDS), np.full(SHARDS, SAMPLES)
    return Order([pool], seed=0).locate(np.arange(SHARDS * SAMPLES)).shard


def webdataset_order() -> NDArray[np.int64]:
    """One reader's samples: shards shuffled, then a buffer of 5,000, as open_clip has it."""
    import webdataset as wds

    shards = wds.detshuffle(2000, initial=500, seed=0).run(iter(range(SHARDS)))
    samples = (shard for shard in shards for _ in range(SAMPLES))
    return np.fromiter(wds.shuffle(5000, initial=1000, seed=0)(samples), np.int64)


def streaming_order(python: str) -> NDArray[np.int64]:
    code = STREAMING.format(shards=SHARDS, samples=SAMPLES)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SHARDS ")]
    return np.asarray(json.loads(line.removeprefix("SHARDS ")))


def quality(shards: NDArray[np.int64]) -> dict[str, float]:
    """Figures of an order, given as the shard of each sample in turn."""
    found = {
        "neighbours_of_one_shard": round(float((shards[1:] == shards[:-1]).mean()), 5),
        "correlation_of_neighbours": round(float(np.corrcoef(shards[1:], shards[:-1])[0, 1]), 5),
    }
    for batch in BATCHES:
        whole = shards[: len(shards) // batch * batch].reshape(-1, batch)
        found[f"shards_in_a_batch_of_{batch}"] = round(float(np.mean([len(np.unique(row)) for row in whole])), 1)
    return found


def shuffle(python: str | None) -> dict[str, Any]:
    """Figures of all orders; Streaming's where an interpreter has it."""
    permuted = np.random.default_rng(0).permutation(np.repeat(np.arange(SHARDS), SAMPLES))
    orders = {"full permutation": permuted, "vdtrain": vdtrain_order(), "WebDataset, buffer 5000": webdataset_order()}
    if python is not None:
        orders["Streaming py1e"] = streaming_order(python)
    for name, order in orders.items():
        if not (np.bincount(order, minlength=SHARDS) == SAMPLES).all():
            raise SystemExit(f"{name}: not an epoch")
    return {
        "shards": SHARDS,
        "samples_per_shard": SAMPLES,
        "left_out": [] if python is not None else ["Streaming py1e"],
        "table": [{"order": name, **quality(order)} for name, order in orders.items()],
    }
