"""A small module laid out like the diffuser, its batches, and the plain PyTorch reference for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vdtrain.config.schema import DEEPSPEED, SHARDED
from vdtrain.engine.deepspeed import EngineSettings
from vdtrain.engine.engine import Engine, StepReport
from vdtrain.engine.flat import FIRST_MOMENT, MASTER, GroupLayout
from vdtrain.run import distributed

MODALITIES = ("image", "text")
# ZeRO stages under DeepSpeed, and our own ZeRO 1.
ZERO: tuple[int | str, ...] = (0, 1, 2, SHARDED)
# (output, context)
ToyFlow = tuple[str, str]
RunOnRanks = Callable[..., list[dict[str, Any]]]
FLOWS: list[ToyFlow] = [(output, context) for output in MODALITIES for context in MODALITIES]
# Every group misses a step, one of them the last.
CHANGING_FLOWS: list[list[ToyFlow]] = [FLOWS, [("image", "text")], [("text", "image"), ("text", "text")], FLOWS[:1]]
SCALES = {"global": 0.1, "data.image": 1.0, "data.text": 0.5, "context.image": 0.3}
WIDTH, CONTEXT_WIDTH, BATCH = 9, 5, 8
LEARNING_RATE, WEIGHT_DECAY, CLIP, BETAS = 1e-2, 0.05, 0.5, (0.9, 0.99)
# AdamW divides a gradient by its size, and with it the gradient's rounding, which every processor does in its own way.
# Gradients here are of order 1 and rounded to 1e-7, so a step moves a weight by LEARNING_RATE * 1e-7 / EPSILON = 1e-6
# more or less at most. With the usual 1e-8, an element whose gradient is nearly zero could move by anything.
EPSILON = 1e-3


class Toy(nn.Module):
    """Returns the summed losses of the given flows."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.global_layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.data_layers = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in MODALITIES})
        # One odd number of elements, so that a row needs padding.
        self.context_layers = nn.ModuleDict({name: nn.Linear(CONTEXT_WIDTH, WIDTH, bias=False) for name in MODALITIES})
        self.to(device())

    def forward(self, flows: Sequence[ToyFlow], data: Tensor, context: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=data.device)
        for output, source in flows:
            hidden = torch.tanh(self.global_layers[0](data) + self.context_layers[source](context))
            predicted = self.global_layers[1](torch.tanh(self.data_layers[output](hidden)))
            total = total + (predicted.float() - target.float()).square().mean()
        return total


def toy_groups(module: Toy, names: Sequence[str] | None = None) -> dict[str, dict[str, nn.Parameter]]:
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        group = "global" if parts[0] == "global_layers" else f"{parts[0].removesuffix('_layers')}.{parts[1]}"
        if names is None or group in names:
            groups.setdefault(group, {})[name] = parameter
    return groups


def device() -> torch.device:
    """This process's: a GPU of its own where there is one."""
    return torch.device("cuda" if torch.cuda.device_count() >= distributed.world_size() else "cpu")


def settings(**changes: Any) -> EngineSettings:
    values: dict[str, Any] = {
        "zero_stage": 1,
        "exchange": DEEPSPEED,
        "precision": "fp32",
        "gradient_clip": CLIP,
        "betas": BETAS,
        "epsilon": EPSILON,
        "weight_decay": WEIGHT_DECAY,
        "gradient_scales": SCALES,
        "gradient_scale_mode": "learning_rate",
    }
    values.update(changes)
    if values["zero_stage"] == SHARDED:
        values.update(zero_stage=1, exchange=SHARDED)
    return EngineSettings(**values)


def global_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of all processes together; targets large enough for clipping to act."""
    generator = torch.Generator().manual_seed(1000 + step)
    data, target = (torch.randn(BATCH, WIDTH, generator=generator) for _ in range(2))
    context = torch.randn(BATCH, CONTEXT_WIDTH, generator=generator)
    return data.to(device()), context.to(device()), 5 * target.to(device())


def micro_batches(step: int, count: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """This process's micro-batches of a step."""
    local = BATCH // distributed.world_size()
    first = distributed.rank() * local
    mine = [tensor[first : first + local].to(dtype) for tensor in global_batch(step)]
    return [list(parts) for parts in zip(*(tensor.chunk(count) for tensor in mine), strict=True)]


def train_step(
    engine: Engine, step: int, flows: Sequence[ToyFlow], count: int = 2, measure: bool = False
) -> tuple[float, StepReport]:
    """One step; its loss over the whole batch, the same on every process, and the engine's report."""
    total = torch.zeros((), dtype=torch.float64)
    for index, parts in enumerate(micro_batches(step, count, engine.compute_dtype)):
        loss = engine(flows, *parts) / count
        engine.backward(loss, last=index == count - 1)
        total += loss.detach().double().cpu()
    dist.all_reduce(total)
    return float(total) / distributed.world_size(), engine.step(LEARNING_RATE, measure)


def reference(
    module: Toy,
    flows_of_steps: Sequence[Sequence[ToyFlow]],
    mode: str = "learning_rate",
    clip: float = CLIP,
    meters: list[dict[str, list[float]]] | None = None,
) -> tuple[list[float], torch.optim.AdamW]:
    """Train on whole batches with plain PyTorch; gradient norms before clipping, and the optimiser.

    Args:
        meters: receives for every step, by group, the gradient norm and the norm of the update over the weights'.
    """
    scales = {group: SCALES.get(group, 1.0) for group in toy_groups(module)}
    by_rate = mode == "learning_rate"
    optimizer = torch.optim.AdamW(
        [
            {"params": list(parameters.values()), "lr": LEARNING_RATE * (scales[group] if by_rate else 1.0)}
            for group, parameters in toy_groups(module).items()
        ],
        betas=BETAS,
        eps=EPSILON,
        weight_decay=WEIGHT_DECAY,
    )
    norms = []
    for step, flows in enumerate(flows_of_steps):
        # A parameter without gradient decays and keeps its momentum, as it does under ZeRO.
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        module(flows, *global_batch(step)).backward()
        for group, parameters in toy_groups(module).items():
            for parameter in parameters.values():
                assert parameter.grad is not None
                parameter.grad.mul_(1.0 if by_rate else scales[group])
        found = {group: [norm_of([each.grad for each in own.values()])] for group, own in toy_groups(module).items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf"))))
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        optimizer.step()
        for group, own in toy_groups(module).items():
            update = norm_of([each.double() - before[name].double() for name, each in own.items()])
            found[group].append(update / norm_of(list(own.values())))
        if meters is not None:
            meters.append(found)
    return norms, optimizer


def norm_of(tensors: Sequence[Tensor | None]) -> float:
    """2-norm of all elements, in float64."""
    return float(torch.cat([each.detach().double().flatten() for each in tensors if each is not None]).norm())


def gather(rows: Sequence[Tensor], layouts: Sequence[GroupLayout]) -> dict[str, Tensor]:
    """Full tensors by parameter name, from every process's flat partitions."""
    weights: dict[str, Tensor] = {}
    for row, layout in zip(rows, layouts, strict=True):
        padded = torch.zeros(layout.partition_size(distributed.world_size()))
        padded[: row.numel()] = row
        partitions = [torch.zeros_like(padded) for _ in range(distributed.world_size())]
        dist.all_gather(partitions, padded)
        whole = torch.cat(partitions)
        for slot in layout.slots:
            weights[slot.name] = slot.shaped(whole[slot.offset : slot.offset + slot.numel]).clone()
    return weights


def full_rows(engine: Engine, kind: str) -> dict[str, Tensor]:
    """Master weights or an average of AdamW, by parameter name."""
    partitions = engine.partitions()
    return gather([part.buffers[kind] for part in partitions], [part.layout for part in partitions])


def full_weights(engine: Engine) -> dict[str, Tensor]:
    return full_rows(engine, MASTER)


def reduced_gradients(engine: Engine, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The unclipped gradients of the step after which the first moments, `before` it, are what they are now."""
    keep = BETAS[0]
    moments = full_rows(engine, FIRST_MOMENT)
    return {name: (moment.double() - keep * before[name].double()) / (1 - keep) for name, moment in moments.items()}


@torch.no_grad()
def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference between two sets of weights of the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name].float().cpu() - other[name].float().cpu()).abs().max()) for name in one)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
