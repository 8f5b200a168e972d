"""What the original modules gave, from the folder `reference`, and the weights that they were given."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

REFERENCE = Path(__file__).parent / "reference"


def recorded(name: str) -> dict[str, Any]:
    """Numbers of a JSON file and tensors of the safetensors file beside it, in one tree: "/" in a name is a level."""
    tree: dict[str, Any] = json.loads((REFERENCE / f"{name}.json").read_text())
    for path, tensor in load_file(REFERENCE / f"{name}.safetensors").items():
        *levels, last = path.split("/")
        reduce(lambda branch, level: branch.setdefault(level, {}), levels, tree)[last] = tensor
    return tree


def rows(name: str) -> list[list[str]]:
    """Fields of a gzipped, tab-separated file, without its comments."""
    lines = gzip.decompress((REFERENCE / f"{name}.gz").read_bytes()).decode().splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


def drawn(label: str, shape: Sequence[int]) -> Tensor:
    """Numbers of [-1, 1), float64, that depend on a label alone: the same on every machine."""
    words = np.random.PCG64(zlib.crc32(label.encode())).random_raw(math.prod(shape))
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-52 - 1).reshape(tuple(shape))


def drawn_weights(shapes: Mapping[str, Sequence[int]], digest: str) -> dict[str, Tensor]:
    """The weights, float32, that the original modules had: of variance 1 / fan-in, those of a norm around 1.

    Args:
        shapes: of every tensor, by its key.
        digest: SHA-256 of all values in this order.
    """
    weights, found = {}, hashlib.sha256()
    for key, shape in shapes.items():
        scale = math.sqrt(3 / math.prod(shape[1:])) if len(shape) > 1 else 0.2
        around = float(len(shape) == 1 and key.endswith("weight"))
        weights[key] = (around + scale * drawn(key, shape)).float()
        found.update(weights[key].numpy().tobytes())
    assert found.hexdigest() == digest, "these are not the weights that the original modules had"
    return weights
