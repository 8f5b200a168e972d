"""Compiles what a stage's step runs, and keeps it in the compiler's cache, for parts that follow in other processes.

python benchmarks/gpu_compile.py [SETTING=VALUE ...]

Settings are those of `vdtrain bench`. Nothing is trained, so the networks need neither masters nor moments: several of
these processes fit on one GPU at once, each for some of the flows.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import torch
from omegaconf import DictConfig

from vdtrain.commands.bench import PARTS, prepared
from vdtrain.config.schema import BenchConfig
from vdtrain.config.validation import stage_flows
from vdtrain.data.synthetic import BATCHES, SyntheticStream
from vdtrain.diffusion.objective import Objective, StepRandom
from vdtrain.diffusion.schedule import Schedule
from vdtrain.engine.flat import lay_out_zeros
from vdtrain.models.execution import compile_training
from vdtrain.models.frozen import build_frozen, each_tensor
from vdtrain.models.frozen_weights import without_weights
from vdtrain.models.trained import trained_parameters
from vdtrain.planning.dry_run import with_stand_ins
from vdtrain.run import distributed
from vdtrain.run.ranks import run_command_on_ranks
from vdtrain.training.build import engine_settings, starting_diffuser
from vdtrain.training.start import Start

USAGE = "Usage: python benchmarks/gpu_compile.py [SETTING=VALUE ...]\n"


def compile_step(config: BenchConfig, raw_config: DictConfig, launch: dict[str, str]) -> int:
    """Run forward and backward of one micro-batch, on all shapes that the benchmark's batches have."""
    if config.hardware.threads is not None:
        # The compiler's code for a CPU depends on it.
        torch.set_num_threads(config.hardware.threads)
    place = distributed.start(config.hardware.device)
    device, dtype = place.device, engine_settings(config).compute_dtype
    config = replace(config, model=with_stand_ins(config.model))
    (phase,) = config.stage.phases
    began = time.monotonic()
    with without_weights(), device:
        diffuser = starting_diffuser(config, Start(), device, device)
        frozen = build_frozen(config.model).to(device, dtype)
    groups = trained_parameters(diffuser, config)
    diffuser.to(dtype)
    # The compiler finds its code by the strides of the weights, among other things.
    lay_out_zeros(groups, dtype)
    if config.hardware.channels_last:
        frozen.to(memory_format=torch.channels_last)
    compile_training(diffuser, frozen, config.hardware.compile)
    objective = Objective(stage_flows(config), Schedule(config.model.schedule, device), frozen, config.objective)
    first = [next(iter(parameters.values())) for parameters in groups.values()]
    rows = config.stage.global_batch_size
    random = StepRandom("", 0, rows, slice(0, rows), device)
    stream = SyntheticStream(rows, phase.resolution, seed=config.seed)
    print(f"built in {time.monotonic() - began:.1f} s", flush=True)
    for _, batch in zip(range(BATCHES), stream, strict=False):
        samples = {
            name: each_tensor(lambda values: values.to(device), values)
            for name, values in objective.prepare(batch.samples).items()
        }
        encoded = objective.encode(samples, phase.resolution, random)
        print(f"encoded after {time.monotonic() - began:.1f} s", flush=True)
        total = objective.total(objective.losses(diffuser, encoded, random))
        print(f"forward after {time.monotonic() - began:.1f} s", flush=True)
        torch.autograd.grad(total, first)
        print(f"backward after {time.monotonic() - began:.1f} s", flush=True)
    distributed.finish()
    return 0


if __name__ == "__main__":
    sys.exit(
        run_command_on_ranks(USAGE, "bench", BenchConfig, compile_step, sys.argv[1:], parts=PARTS, prepare=prepared)
    )
