"""Importing DeepSpeed quietly, quickly, and without compiling anything."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from typing import Any

DEEPSPEED_VERSION = "0.19.8"


def import_deepspeed(device_type: str) -> Any:
    """Import DeepSpeed for a kind of device, without building anything: a machine may have no compiler."""
    # Otherwise it searches for an accelerator and warns that it found none.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    deepspeed: Any = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Said to be unavailable, its shared-memory collectives are neither compiled nor used; gloo does their work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with _dynamo_disabled():
        # Muon's module compiles functions as it is imported, which costs seconds and is never used here.
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    return deepspeed


@contextlib.contextmanager
def _dynamo_disabled() -> Iterator[None]:
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
