"""`vdtrain plan`'s memory against what a GPU measures, for the diffuser, its gradients and AdamW in plain PyTorch.

python benchmarks/memory.py                             # stage 3, the micro-batches of hardware=h100
python benchmarks/memory.py stage=stage1_single_flow hardware=h200 hardware.activation_checkpointing=blocks

Without DeepSpeed there is one process, and gradients and AdamW's averages are in the compute dtype; the frozen parts
stay away, and latents and contexts are random numbers. Takes the settings of `vdtrain train` and
writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import stage_flows
from vdtrain.diffusion.objective import Objective, StepRandom
from vdtrain.diffusion.schedule import Schedule
from vdtrain.flows import active_groups
from vdtrain.models.context_layers import use_kernel
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.execution import checkpoint_activations
from vdtrain.models.frozen import Encoded
from vdtrain.planning.dry_run import DryRun, tensor_bytes

RESULT = Path(__file__).parent / "results" / "memory.json"
DEFAULTS = ("stage=stage3_four_flow", "hardware=h100")


class NoContexts:
    """Stands where the frozen parts are: contexts of no sample, of the shapes that the dry run has."""

    def __init__(self, encoded: Encoded) -> None:
        self.contexts = encoded.contexts

    def unconditional(self, flow: Any, batch: int) -> torch.Tensor:
        return torch.zeros_like(self.contexts[flow.context][:batch])


def predicted(dry_run: DryRun, resolution: int, micro_batch: int) -> dict[str, int]:
    """Bytes of a step: weights, gradients and averages, what a micro-batch takes, and all at most."""
    weights = tensor_bytes(dry_run.diffuser)
    micro_batch_peak = dry_run.measure(resolution, micro_batch).peak
    return {
        "weights": weights,
        "gradients": weights,
        "averages": 2 * weights,
        "forward_and_backward": micro_batch_peak,
        "at_most": 4 * weights + micro_batch_peak,
    }


def train(config: TrainConfig, shapes: Encoded, micro_batch: int, device: str) -> None:
    """Two steps on random numbers, the second with gradients, averages and all there from its start."""
    flows = stage_flows(config)
    dtype = torch.bfloat16 if config.hardware.precision == "bf16" else torch.float32
    diffuser = Diffuser(config.model, active_groups(flows)).to(device, dtype)
    use_kernel(diffuser, config.hardware.attention)
    checkpoint_activations(diffuser, config.hardware.activation_checkpointing)
    optimizer = torch.optim.AdamW(diffuser.parameters(), lr=1e-5, fused=True)
    encoded = Encoded(
        {name: torch.randn(latents.shape, device=device, dtype=dtype) for name, latents in shapes.latents.items()},
        {name: torch.randn(tokens.shape, device=device, dtype=dtype) for name, tokens in shapes.contexts.items()},
    )
    contexts: Any = NoContexts(encoded)
    objective = Objective(flows, Schedule(config.model.schedule, device), contexts, config.objective)
    for step in range(2):
        rng = StepRandom("memory", step, micro_batch, slice(0, micro_batch), torch.device(device))
        objective.total(objective.losses(diffuser, encoded, rng)).backward()
        optimizer.step()
        # Kept, as between the micro-batches of a step.
        optimizer.zero_grad(set_to_none=False)


def main(argv: Sequence[str]) -> int:
    """Measure every phase; 2 if there is no GPU or a setting is mistaken."""
    if not torch.cuda.is_available():
        print("error: benchmarks/memory.py compares with a GPU, and PyTorch finds none", file=sys.stderr)
        return 2
    try:
        config = to_object(compose("train", [*DEFAULTS, *argv]), TrainConfig)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    dry_run = DryRun(config)
    rows = []
    for phase in config.stage.phases:
        micro_batch = config.hardware.micro_batch_size[phase.resolution]
        expected = predicted(dry_run, phase.resolution, micro_batch)
        torch.cuda.reset_peak_memory_stats()
        train(config, dry_run.encoded(phase.resolution, micro_batch), micro_batch, "cuda")
        found = int(torch.cuda.max_memory_allocated())
        torch.cuda.empty_cache()
        ratio = round(expected["at_most"] / found, 4)
        rows.append({"resolution": phase.resolution, "micro_batch": micro_batch, **expected, "counted": found})
        rows[-1]["predicted_over_counted"] = ratio
        print(json.dumps(rows[-1]))
    device = torch.cuda.get_device_name()
    command = " ".join(["python benchmarks/memory.py", *argv])
    result = {"command": command, "device": device, "torch": torch.__version__, "phases": rows}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
