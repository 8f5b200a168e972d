"""What `vdtrain weights export` writes: one function for each format.

PyTorch is imported inside the functions, so that help and errors of the command line are fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vdtrain.config.schema import ModelConfig
from vdtrain.files import write_text, written_whole
from vdtrain.progress import track

if TYPE_CHECKING:
    from torch import Tensor

    from vdtrain.weights.tensor_files import LazyTensors

# Names of PyTorch's dtypes; None keeps the dtype of each tensor.
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "keep": None}
OUTPUT = "output"


def versatile_diffusion(output: Path, tensors: LazyTensors, model: ModelConfig, overwrite: bool, card: str) -> None:
    """One .pth in the layout of the released vd-four-flow-v1-0."""
    from vdtrain.weights.published.versatile_diffusion import to_released

    write_torch(output, tensors.renamed({to_released(name): name for name in tensors}), overwrite)
    beside = card_beside(output)
    with written_whole(beside, f"{OUTPUT}={beside}", overwrite) as draft:
        write_text(draft, card)


def safetensors(output: Path, tensors: LazyTensors, model: ModelConfig, overwrite: bool, card: str) -> None:
    """A weights folder: the same keys as safetensors, with the model's configuration."""
    from vdtrain.weights.folder import write_weights_folder

    write_weights_folder(output, tensors, model, overwrite, card)


def diffusers(output: Path, tensors: LazyTensors, model: ModelConfig, overwrite: bool, card: str) -> None:
    """A folder for diffusers' Versatile Diffusion pipelines, with the frozen parts."""
    from vdtrain.weights.published.diffusers_folder import write_pipeline

    write_pipeline(output, tensors, model, OUTPUT, overwrite, card)


Format = Callable[[Path, "LazyTensors", ModelConfig, bool, str], None]
"""(output, the diffuser by our names, its model, whether to replace what exists, the text of the model card). Raises a
ConfigError if the output exists or cannot be written. The first line of the docstring is its help."""

FORMATS: dict[str, Format] = {each.__name__: each for each in (versatile_diffusion, safetensors, diffusers)}


def card_beside(output: Path) -> Path:
    """The file of the model card of an export that is one file."""
    return output.with_name(f"{output.stem}.README.md")


def write_torch(path: Path, tensors: Mapping[str, Tensor], overwrite: bool = False) -> None:
    """Write a state dict that `torch.load` reads. The file appears when it is whole.

    Args:
        tensors: each is read once and keeps its dtype. All are in memory at the same time.
        overwrite: replace what exists.

    Raises:
        ConfigError: the path exists already, or the file cannot be written.
    """
    import torch

    with written_whole(path, f"{OUTPUT}={path}", overwrite) as draft, draft.open("wb") as file:
        # A tensor may be a view of a whole file, and PyTorch would write that file with each of its tensors.
        state = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in track(tensors.items(), "reading", "tensors")
        }
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # PyTorch hides the system's error behind one about a position in the file.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
