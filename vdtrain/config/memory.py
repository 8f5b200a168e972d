"""What a command says when memory is out: the settings that make it need less."""

from __future__ import annotations

from typing import Any

from vdtrain.config.command_schema import AUTO, LatentsConfig, SamplerConfig
from vdtrain.config.schema import TrainConfig
from vdtrain.errors import one_line, out_of_memory


def memory_problem(error: BaseException, config: Any) -> str | None:
    """One line for an error of memory, with the settings that help; None for another error.

    Args:
        config: of the command.
    """
    if not out_of_memory(error):
        return None
    said = one_line(error).partition(". ")[0][:200]
    if isinstance(config, TrainConfig):
        remedies = _of_training(config)
    elif isinstance(config, LatentsConfig):
        remedies = [f"data.latent_cache.batch_size={max(1, config.data.latent_cache.batch_size // 2)}"]
    elif isinstance(config, SamplerConfig):
        remedies = _of_sampling(config)
    else:
        remedies = ["a machine with more memory"]
    return f"out of memory ({said}); try {', or '.join(remedies)}"


def _of_training(config: TrainConfig) -> list[str]:
    hardware = config.hardware
    sizes = {each.resolution: hardware.micro_batch_size.get(each.resolution, 1) for each in config.stage.phases}
    smaller = [f"hardware.micro_batch_size.{pixels}={size // 2}" for pixels, size in sizes.items() if size > 1]
    found = [f"{' '.join(smaller)} (the steps stay the same)"] if smaller else []
    if hardware.activation_checkpointing != "blocks":
        found.append("hardware.activation_checkpointing=blocks")
    if hardware.zero_stage < 2:
        found.append(f"hardware.zero_stage={hardware.zero_stage + 1} on several GPUs")
    return found or ["fewer flows, or a GPU with more memory"]


def _of_sampling(config: SamplerConfig) -> list[str]:
    import torch

    found = [f"batch_size={config.batch_size // 2}"] if config.batch_size > 1 else []
    on_cpu = config.device == "cpu" or (config.device == AUTO and not torch.cuda.is_available())
    if config.precision == "fp32" or (config.precision == AUTO and on_cpu):
        found.append("precision=bf16" if on_cpu else "precision=fp16")
    return [*found, "a smaller resolution"]
