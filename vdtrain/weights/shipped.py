"""The trained model that the package brings: what `checkpoint=tiny` names."""

from __future__ import annotations

from pathlib import Path

from vdtrain.checkpoint.folder import CHECKPOINTS, is_checkpoint
from vdtrain.models.frozen_weights import ASSETS

# By name, the weights folder. `examples/ship_miniature.py` makes it.
SHIPPED = {"tiny": ASSETS / "tiny" / "trained"}
RECORD = "weights.json"


def located(value: str) -> Path:
    """The folder that a setting for a checkpoint names.

    A name in `SHIPPED` is the package's own model, unless that path holds a checkpoint.
    """
    path = Path(value).expanduser()
    if value not in SHIPPED or (path / RECORD).is_file() or (path / CHECKPOINTS).is_dir() or is_checkpoint(path):
        return path
    return SHIPPED[value]
