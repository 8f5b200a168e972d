"""Predicts a stage's memory on each GPU, its disk space, and the steps of its phases, without a GPU.

The bytes that stay between steps follow from the engine's flat buffers and their partitions. A dry run (dry_run.py)
measures the bytes of a micro-batch, and counts.py keeps those of the presets. One GB is 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from vdtrain.config.schema import DEEPSPEED, REPLICATED, TrainConfig, strategy_kind
from vdtrain.config.validation import learning_rate, micro_batches, phase_steps, trained_groups
from vdtrain.engine.deepspeed import BUCKET_ELEMENTS
from vdtrain.engine.flat import GroupLayout
from vdtrain.models.diffuser import parameters_by_group
from vdtrain.planning.counts import Stored, counts
from vdtrain.planning.dry_run import DryRun, MicroBatchMemory, meta_diffuser

GB = 10**9
FLOAT32 = 4
# Under ZeRO 1 with bf16, DeepSpeed reduces gradients in copies; it starts a new copy after this many elements.
REDUCED_TOGETHER = 500_000_000
LEFT_OUT = (
    "the CUDA context and the allocator's slack (a card's nominal GB are GiB; the extra 7 % covers both)",
    "the kernels' internal buffers (workspaces of cuDNN and cuBLAS)",
    "layers that this stage only keeps for a later one",
)


@dataclass(frozen=True)
class StandingMemory:
    """Bytes on one GPU that stay between steps.

    Attributes:
        weights: of the diffuser, in the compute dtype.
        masters: float32 weights; 0 if `weights` are the masters.
        gradients: between the micro-batches of a step.
        frozen: VAEs and context encoders, in the compute dtype.
        untrained: what the stage uses of the diffuser and does not train, in the compute dtype.
    """

    weights: int
    masters: int
    gradients: int
    moments: int
    ema: int
    frozen: int
    untrained: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class PhaseMemory:
    """One phase on one GPU, in bytes.

    Attributes:
        samples: pairs in whole steps.
        micro_batch: pairs in one forward pass.
        exchange: communication buffers of the gradients during backward.
        update: peak of the gradient reduction and the weight update, after the activations are freed.
        largest_micro_batch: the largest divisor of the batch that fits; 0 if none fits, None if the GPU's memory is
            unknown.
        learning_rate: of its first and of its last step.
    """

    resolution: int
    samples: int
    steps: int
    micro_batch: int
    micro_batches: int
    measured: MicroBatchMemory
    exchange: int
    update: int
    peak: int
    largest_micro_batch: int | None
    learning_rate: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class StagePlan:
    """A stage on `gpus` GPUs of `memory` bytes each.

    Attributes:
        parameters: number of trained parameters, by layer group.
        checkpoint: bytes of one checkpoint on disk, over all processes.
        checkpoints: upper bound of the bytes of all checkpoints at the end.
        left_out: items that the figures do not contain.
        warnings: one for each phase that does not fit.
        untrained_parameters: number of those of the diffuser that the stage uses and does not train.
    """

    stage: str
    gpus: int
    memory: int | None
    parameters: dict[str, int]
    frozen_parameters: int
    pairs_per_step: int
    standing: StandingMemory
    phases: list[PhaseMemory]
    checkpoint: int
    checkpoints: int
    left_out: list[str]
    warnings: list[str] = field(default_factory=list)
    untrained_parameters: int = 0


def plan_stage(config: TrainConfig, gpus: int) -> StagePlan:
    """Plan every phase of a stage.

    Raises:
        ConfigError: a part cannot be built, or the batch does not divide evenly.
    """
    counted, diffuser, stage = counts(config), meta_diffuser(config), config.stage
    groups = parameters_by_group(diffuser, trained=True)
    # In the engine's order.
    deepspeed = strategy(config, gpus) == DEEPSPEED
    layouts = [GroupLayout.of(group, groups[group], deepspeed) for group in trained_groups(config) if group in groups]
    untrained = sum(parameter.numel() for parameter in diffuser.parameters() if not parameter.requires_grad)
    standing = standing_memory(config, layouts, gpus, counted.frozen_bytes, untrained)
    memory = None if config.hardware.memory_gb is None else int(config.hardware.memory_gb * GB)
    phases = [_plan_phase(config, index, counted, standing.total, layouts, gpus) for index in range(len(stage.phases))]
    checkpoint, every = checkpoint_bytes(config, layouts) + FLOAT32 * untrained, config.checkpoint.keep_every_steps
    kept = config.checkpoint.keep + (sum(phase.steps for phase in phases) // every if every else 0)
    return StagePlan(
        stage=config.stage.name,
        gpus=gpus,
        memory=memory,
        parameters={layout.group: layout.numel for layout in layouts},
        frozen_parameters=counted.frozen_parameters,
        pairs_per_step=config.stage.global_batch_size,
        standing=standing,
        phases=phases,
        checkpoint=checkpoint,
        checkpoints=kept * checkpoint,
        left_out=[*LEFT_OUT, *(f"encoding by {setting}" for setting in sorted(counted.unmeasured))],
        warnings=[_warning(phase, memory) for phase in phases if memory is not None and phase.peak > memory],
        untrained_parameters=untrained,
    )


def _plan_phase(
    config: TrainConfig,
    index: int,
    counted: Stored | DryRun,
    standing: int,
    layouts: Sequence[GroupLayout],
    gpus: int,
) -> PhaseMemory:
    phase = config.stage.phases[index]
    count = micro_batches(config, phase.resolution, gpus)
    local = config.stage.global_batch_size // gpus
    micro = local // count
    exchange, update = exchange_bytes(config, gpus), update_bytes(config, layouts, gpus)

    gradients = compute_bytes(config) * sum(layout.numel for layout in layouts)

    def peak_at(size: int) -> int:
        of = counted.measure(phase.resolution, size)
        if config.hardware.cuda_graphs:
            # The graphs keep what their passes allocate, and the gradients of all weights at once.
            return standing + gradients + of.peak + max(of.encoding, exchange, update)
        return standing + max(of.encoding, of.peak + exchange, update)

    measured = counted.measure(phase.resolution, micro)
    memory = config.hardware.memory_gb
    largest = None if memory is None else _largest(peak_at, micro, local, int(memory * GB))
    steps, before = phase_steps(config, phase), sum(phase_steps(config, each) for each in config.stage.phases[:index])
    return PhaseMemory(
        resolution=phase.resolution,
        samples=steps * config.stage.global_batch_size,
        steps=steps,
        learning_rate=(learning_rate(config, before + 1), learning_rate(config, before + steps)),
        micro_batch=micro,
        micro_batches=count,
        measured=measured,
        exchange=exchange,
        update=update,
        peak=peak_at(micro),
        largest_micro_batch=largest,
    )


def _largest(peak_at: Callable[[int], int], micro: int, local: int, memory: int) -> int:
    """The largest micro-batch that divides `local` and whose peak fits into the memory; 0 if none fits."""
    peak, twice = peak_at(micro), peak_at(2 * micro)
    # Peaks grow at least as fast as the line through two of them, so sizes beyond `reach` cannot fit.
    reach = micro + (memory - peak) * micro // max(1, twice - peak)
    candidates = [size for size in range(1, local + 1) if local % size == 0 and size <= reach]
    return next((size for size in reversed(candidates) if peak_at(size) <= memory), 0)


def _warning(phase: PhaseMemory, memory: int) -> str:
    def setting(size: int) -> str:
        return f"hardware.micro_batch_size={{{phase.resolution}: {size}}}"

    remedy = (
        f"{setting(phase.largest_micro_batch)} fits"
        if phase.largest_micro_batch
        else "no micro-batch fits; choose hardware.activation_checkpointing=blocks, hardware.zero_stage=2 or more gpus"
    )
    return f"{setting(phase.micro_batch)} takes {phase.peak / GB:.1f} GB of {memory / GB:.0f}; {remedy}"


def standing_memory(
    config: TrainConfig, layouts: Sequence[GroupLayout], gpus: int, frozen: int = 0, untrained: int = 0
) -> StandingMemory:
    """The engine's bytes for a diffuser that trains `layouts`, on the first of `gpus` processes.

    Args:
        untrained: number of the diffuser's other parameters.
    """
    kind, stage, size = strategy(config, gpus), config.hardware.zero_stage, compute_bytes(config)
    partitions = sum(layout.partition_size(gpus) for layout in layouts)
    buffers = partitions * gpus
    held = buffers if kind == REPLICATED else partitions
    gradients = partitions if kind == DEEPSPEED and stage == 2 else buffers
    if size == FLOAT32 and kind == DEEPSPEED:
        # Float32 gradients stay with their parameters, also those that lie only partly in a partition.
        bounds = [layout.partition(0, gpus if stage == 2 else 1) for layout in layouts]
        gradients = sum(_numel_within(layout, *bound) for layout, bound in zip(layouts, bounds, strict=True))
    own = sum(stop - start for start, stop in (layout.partition(0, gpus) for layout in layouts))
    return StandingMemory(
        weights=size * buffers,
        masters=0 if size == FLOAT32 and kind != DEEPSPEED else FLOAT32 * held,
        gradients=FLOAT32 * gradients,
        moments=2 * FLOAT32 * held,
        ema=FLOAT32 * own if config.ema.enabled else 0,
        frozen=frozen,
        untrained=size * untrained,
    )


def exchange_bytes(config: TrainConfig, gpus: int) -> int:
    """DeepSpeed's bucket that communicates gradients during backward; under bf16, with its reduced float32 copy."""
    stage, size = config.hardware.zero_stage, compute_bytes(config)
    if strategy(config, gpus) != DEEPSPEED or (stage == 1 and size < FLOAT32):
        return 0
    return BUCKET_ELEMENTS * (size if size == FLOAT32 else size + FLOAT32)


def update_bytes(config: TrainConfig, layouts: Sequence[GroupLayout], gpus: int) -> int:
    """After backward, DeepSpeed's ZeRO 1 reduces copies of buffers; in float32 it copies its partition twice."""
    stage, size = config.hardware.zero_stage, compute_bytes(config)
    if strategy(config, gpus) != DEEPSPEED:
        return 0
    partitions = [layout.partition_size(gpus) for layout in layouts]
    if size == FLOAT32:
        return FLOAT32 * (2 * sum(partitions) + BUCKET_ELEMENTS)
    if stage != 1:
        return 0
    copies: list[int] = [0]
    together: list[int] = []
    for partition in partitions:
        together.append(partition * gpus)
        # A single buffer is reduced in place.
        copies.append(sum(together) if len(together) > 1 else 0)
        if sum(together) > REDUCED_TOGETHER:
            together = []
    return FLOAT32 * max(copies)


def checkpoint_bytes(config: TrainConfig, layouts: Sequence[GroupLayout]) -> int:
    """Float32 weights, AdamW's moving averages and EMA weights in one checkpoint's files, over all processes."""
    kinds = 4 if config.ema.enabled else 3
    return kinds * FLOAT32 * sum(layout.numel for layout in layouts)


def strategy(config: TrainConfig, gpus: int) -> str:
    return strategy_kind(config.hardware.zero_stage, config.hardware.exchange, gpus)


def compute_bytes(config: TrainConfig) -> int:
    """Bytes of a weight that forward and backward use."""
    return 2 if config.hardware.precision == "bf16" else FLOAT32


def _numel_within(layout: GroupLayout, start: int, stop: int) -> int:
    """Elements of the parameters that lie at least partly within a partition."""
    return sum(slot.numel for slot in layout.slots if slot.offset < stop and slot.offset + slot.numel > start)
