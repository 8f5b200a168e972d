"""What `vdtrain weights export` writes: every format by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vdtrain.config import ModelConfig
from vdtrain.weights.diffusers_folder import write_pipeline
from vdtrain.weights.folder import Tracked, write_weights_folder
from vdtrain.weights.tensor_files import LazyTensors
from vdtrain.weights.torch_file import write_torch
from vdtrain.weights.versatile_diffusion_v1 import to_released

Write = Callable[[Path, LazyTensors, ModelConfig, bool, Tracked], None]
"""(output, the diffuser by our names, its model, whether to replace what is there, progress)."""

DTYPES: dict[str, torch.dtype | None] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "keep": None,
}
OUTPUT = "output"


def _released(output: Path, tensors: LazyTensors, model: ModelConfig, overwrite: bool, tracked: Tracked) -> None:
    write_torch(output, tensors.renamed({to_released(name): name for name in tensors}), OUTPUT, overwrite, tracked)


def _weights_folder(output: Path, tensors: LazyTensors, model: ModelConfig, overwrite: bool, tracked: Tracked) -> None:
    write_weights_folder(output, tensors, model, OUTPUT, overwrite, tracked)


def _pipeline(output: Path, tensors: LazyTensors, model: ModelConfig, overwrite: bool, tracked: Tracked) -> None:
    write_pipeline(output, tensors, model, OUTPUT, overwrite)


WRITERS: dict[str, Write] = {
    "versatile_diffusion": _released,
    "safetensors": _weights_folder,
    "diffusers": _pipeline,
}
