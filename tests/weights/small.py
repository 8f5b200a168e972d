"""The tiny model and a diffuser of it with weights of its own, for the tests of weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from vdtrain.checkpoint import format as form
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.engine.flat import EMA, MASTER, GroupLayout
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import Diffuser, layer_group
from vdtrain.models.layer_plan import make_plan

MODEL: ModelConfig = to_object(compose("train", ["model=tiny"]), TrainConfig).model
PLAN = make_plan(MODEL.diffuser)
MODALITIES = ["image", "text"]
# The one group that the run of `write_run` did not train.
CARRIED = "context.text"
GROUPS = active_groups(all_flows(MODALITIES))


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """The whole diffuser by our names, every tensor at random, and the caller's own."""
    return {name: tensor.to(dtype, copy=True) for name, tensor in drawn(seed).items()}


@cache
def drawn(seed: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        outline = Diffuser(MODEL, GROUPS).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in outline.items()}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether names, dtypes and bits are equal."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def recorded() -> dict[str, Any]:
    """The configuration of a run of the tiny model, as a checkpoint holds it."""
    document = OmegaConf.to_container(compose("train", ["model=tiny"]), resolve=False)
    assert isinstance(document, dict)
    return {str(key): value for key, value in document.items()}


def write_run(run: Path, config: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """A run of two processes with one checkpoint: `weights()`, averaged `weights(seed=1)`, one group not trained."""
    tensors = tensors or weights()
    folder = run / "checkpoints" / "step-000000007"
    folder.mkdir(parents=True)
    groups: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(layer_group(name), {})[name] = torch.nn.Parameter(tensor)
    carried = {name: parameter.detach() for name, parameter in groups.pop(CARRIED).items()}
    layouts = tuple(GroupLayout.of(group, parameters) for group, parameters in groups.items())
    records = {form.CARRIED_OVER_FILE: form.write_tensors(folder / form.CARRIED_OVER_FILE, carried)}
    for rank in range(2):
        pieces = {}
        for kind, source in ((MASTER, tensors), (EMA, weights(seed=1))):
            for layout in layouts:
                row = torch.cat([source[slot.name].reshape(-1) for slot in layout.slots])
                pieces[f"{layout.group}/{kind}"] = row[slice(*layout.partition(rank, 2))]
        name = form.shard_name(rank, 2)
        records[name] = form.write_tensors(folder / name, pieces)
    form.Index(
        step=7,
        world_size=2,
        zero_stage=1,
        precision="fp32",
        optimizer_steps=7,
        ema_updates=7,
        trainer={"config": config or recorded(), "state": {}},
        groups=layouts,
        files=records,
    ).write(folder)
    return run
