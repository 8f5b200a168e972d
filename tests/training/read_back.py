"""Short forms of reading a checkpoint folder back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from vdtrain.checkpoint.format import Checkpoint, Index


def read_weights(path: Path, which: str = "model") -> dict[str, Tensor]:
    return dict(Checkpoint.open(path).weights(which))


def read_trainer_state(path: Path) -> dict[str, Any]:
    return Index.read(path).trainer
