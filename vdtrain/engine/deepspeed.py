"""The engine's settings, DeepSpeed's import and its configuration."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vdtrain.config.schema import DEEPSPEED, REPLICATED, SHARDED, HardwareConfig, strategy_kind

DEEPSPEED_VERSION = "0.19.8"


def import_deepspeed(device_type: str) -> Any:
    """Import DeepSpeed for a device type without compiling anything: a machine may have no compiler."""
    # Without it, DeepSpeed searches for an accelerator and warns if it finds none.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    deepspeed: Any = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # This turns off its shared-memory collectives, which it would compile; gloo does their work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with _dynamo_disabled():
        # Muon's module compiles functions on import. It costs seconds and is not used here.
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


# Elements per collective: long enough to fill a network, short enough to add little memory.
BUCKET_ELEMENTS = 50_000_000
PRECISIONS = ("fp32", "bf16")
LEARNING_RATE_MODE, GRADIENT_MODE = "learning_rate", "gradient"


def strategy_line(hardware: HardwareConfig, world_size: int) -> str:
    """How weights, gradients and optimiser state are kept and exchanged, for people."""
    stage = hardware.zero_stage
    kind = strategy_kind(stage, hardware.exchange, world_size)
    if kind == REPLICATED:
        alone = f" (hardware.zero_stage={stage} is for several)" if stage > 0 else ""
        return f"weights, gradients and optimiser state are whole on {'the one' if alone else 'every'} process{alone}"
    return f"ZeRO {stage}, {'with reduce-scatter during backward' if kind == SHARDED else 'exchanged by DeepSpeed'}"


@dataclass(frozen=True)
class EngineSettings:
    """Settings of the optimiser and of its partitions.

    Attributes:
        zero_stage: 0 (replicas), 1 (optimiser state is partitioned) or 2 (gradients too).
        precision: "fp32", or "bf16" for forward and backward; weights, sums and reductions stay float32.
        gradient_clip: largest global norm of the gradient; 0 disables clipping.
        gradient_scales: factor of each layer group; 1 by default.
        gradient_scale_mode: "learning_rate" (the factor multiplies the group's learning rate) or "gradient".
        exchange: who exchanges gradients and weights under ZeRO 1; see `strategy_kind`.
        fused: whether a compiled pass updates the buffers, if the strategy can let it write its weights.
    """

    zero_stage: int
    precision: str
    gradient_clip: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    gradient_scales: Mapping[str, float]
    gradient_scale_mode: str
    exchange: str = DEEPSPEED
    fused: bool = False

    def gradient_scale(self, group: str) -> float:
        """The factor that a group's gradients are multiplied by as they arrive."""
        return float(self.gradient_scales.get(group, 1.0)) if self.gradient_scale_mode == GRADIENT_MODE else 1.0

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the weights that forward and backward use."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def deepspeed_configuration(settings: EngineSettings) -> dict[str, Any]:
    """DeepSpeed's configuration for ZeRO 1 and 2.

    Set explicitly, because DeepSpeed's defaults differ or may change.
    """
    configuration: dict[str, Any] = {
        # The trainer weights micro-batches itself; DeepSpeed only counts with these two.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        # The engine clips. DeepSpeed's default is 1.0.
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": settings.zero_stage,
            # With overlap, ZeRO 1 reduces only the last micro-batch's gradients.
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            # Checkpoints rely on the parameters' own order.
            "round_robin_gradients": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
    }
    if settings.precision == "bf16":
        configuration["bf16"] = {"enabled": True, "immediate_grad_update": True}
        configuration["data_types"] = {"grad_accum_dtype": "fp32"}
        configuration["communication_data_type"] = "fp32"
    return configuration
