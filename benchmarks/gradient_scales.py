"""How far a layer group moves when its gradient, or its learning rate, is multiplied by 0.1: docs/choices.md quotes it.

python benchmarks/gradient_scales.py        # writes benchmarks/results/gradient_scales.json

The tiny diffuser learns image variation and text-to-image on drawn images with plain PyTorch: AdamW without weight
decay and clipping at a norm of 1, as in training. Every run has the same start, samples and noise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miniature.corpus import draw_images, sample_scenes, write_captions
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import stage_flows
from vdtrain.diffusion.objective import Objective, StepRandom
from vdtrain.diffusion.schedule import Schedule
from vdtrain.flows import active_groups
from vdtrain.models.diffuser import Diffuser, parameters_by_group
from vdtrain.models.frozen import build_frozen

RESULT = Path(__file__).parent / "results" / "gradient_scales.json"
SCALED_GROUP, SCALE = "data.image", 0.1
STEPS, BATCH, RESOLUTION = 150, 16, 32
SETTINGS = ("model=tiny", "data=shapes", "hardware=cpu", "stage=stage2_dual_flow", f"stage.global_batch_size={BATCH}")


def movements(config: TrainConfig, steps: int, gradient: float, rate: float, clip: float) -> dict[str, float]:
    """Train; the 2-norm of every layer group's displacement from its start.

    Args:
        gradient, rate: factors on the gradient and on the learning rate of SCALED_GROUP.
        clip: largest norm of the gradient; 0 for none.
    """
    flows = stage_flows(config)
    diffuser = Diffuser(config.model, active_groups(flows))
    groups = {name: list(parameters.values()) for name, parameters in parameters_by_group(diffuser).items()}
    start = {name: [parameter.detach().clone() for parameter in parameters] for name, parameters in groups.items()}
    for parameter in groups[SCALED_GROUP]:
        parameter.register_hook(lambda given: given * gradient)
    learning_rate = config.stage.learning_rate * config.optimizer.learning_rate_scale
    first, second = config.optimizer.betas
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": learning_rate * (rate if name == SCALED_GROUP else 1.0)}
            for name, parameters in groups.items()
        ],
        betas=(first, second),
        eps=config.optimizer.epsilon,
        weight_decay=config.optimizer.weight_decay,
    )
    objective = Objective(flows, Schedule(config.model.schedule), build_frozen(config.model), config.objective)
    random = np.random.default_rng(0)
    for step in range(steps):
        scenes = sample_scenes(BATCH, random)
        samples = {"image": draw_images(scenes, RESOLUTION, random), "text": write_captions(scenes, random)}
        rng = StepRandom("gradient scales", step, BATCH, slice(0, BATCH), torch.device("cpu"))
        losses = objective.losses(diffuser, objective.encode(samples, RESOLUTION, rng), rng)
        optimizer.zero_grad()
        objective.total(losses).backward()
        if clip > 0:
            torch.nn.utils.clip_grad_norm_(diffuser.parameters(), clip)
        optimizer.step()
    return {name: _distance(parameters, start[name]) for name, parameters in groups.items()}


def measure(steps: int = STEPS) -> dict[str, object]:
    """Displacements as ratios to the run without any factor."""
    config = to_object(compose("train", list(SETTINGS)), TrainConfig)
    clip = config.optimizer.gradient_clip
    reference = movements(config, steps, 1.0, 1.0, clip)
    unclipped = movements(config, steps, 1.0, 1.0, 0.0)
    runs = {
        "gradient": (movements(config, steps, SCALE, 1.0, clip), reference),
        "gradient_without_clipping": (movements(config, steps, SCALE, 1.0, 0.0), unclipped),
        "learning_rate": (movements(config, steps, 1.0, SCALE, clip), reference),
    }
    ratios = {run: {name: round(moved[name] / base[name], 4) for name in base} for run, (moved, base) in runs.items()}
    return {
        "command": "python benchmarks/gradient_scales.py",
        "what": f"displacement of each layer group after {steps} steps over that without a factor",
        "scaled_group": SCALED_GROUP,
        "scale": SCALE,
        "ratios": ratios,
        "displacement_without_a_factor": {name: round(distance, 4) for name, distance in reference.items()},
    }


def _distance(parameters: list[torch.nn.Parameter], start: list[Tensor]) -> float:
    squares = [
        (parameter.detach() - before).square().sum() for parameter, before in zip(parameters, start, strict=True)
    ]
    return float(torch.stack(squares).sum().sqrt())


if __name__ == "__main__":
    found = measure(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
