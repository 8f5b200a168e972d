"""What a stage needs beside a configuration that can work: a start, enough shards, room on the disk, a tracker."""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from vdtrain.checkpoint.folder import CHECKPOINTS, CheckpointError, candidates, latest_by_sizes
from vdtrain.config.command_line import shell
from vdtrain.config.compose import ConfigError
from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import phase_steps, problems, stage_flows, warmup_samples
from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.errors import one_line, output_problem, unreadable
from vdtrain.flows import active_groups
from vdtrain.run.lock import RunLock
from vdtrain.run.wandb_run import wandb_problem

if TYPE_CHECKING:
    from vdtrain.training.start import Start

GB, FLOAT32 = 10**9, 4
OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """A line on something that was looked at: kind is "ok", "warning" or "error"."""

    kind: str
    line: str


def findings(config: TrainConfig, raw_config: DictConfig, ranks: int) -> Iterator[Finding]:
    """Look at everything, what costs least first; errors do not end the looking.

    Args:
        raw_config: the composed configuration, unresolved.
        ranks: number of processes that will train.
    """
    mistakes: set[str] = set()
    for line in problems(config, ranks):
        if line not in mistakes:
            yield Finding(ERROR, line)
        mistakes.add(line)
    if not mistakes:
        yield Finding(OK, _extent(config, ranks))
        yield from warm_up(config)
    if Path(config.data.manifest).exists():
        yield from data(config, ranks, settled=not mistakes)
    yield from in_use(config)
    yield from start_and_room(config, raw_config, settled=not mistakes)
    yield tracking(config)


def warm_up(config: TrainConfig) -> Iterator[Finding]:
    """Does the stage come to its learning rate?"""
    total = sum(phase_steps(config, phase) for phase in config.stage.phases) * config.stage.global_batch_size
    if warmup_samples(config) > total:
        yield Finding(
            WARNING,
            f"optimizer.warmup_samples={config.optimizer.warmup_samples}: the stage has {total:,} samples, and ends "
            "before it comes to its learning rate; set a smaller number",
        )


def data(config: TrainConfig, ranks: int, settled: bool = True) -> Iterator[Finding]:
    """Are there as many shards as loader workers, and can the stream of every phase be opened?

    With fewer shards than workers, workers wait for the bytes of the same file.

    Args:
        settled: False where the settings are mistaken, and no stream can be made by them.
    """
    manifest, workers = config.data.manifest, config.hardware.loader_workers
    try:
        count, needed = len(Manifest(Path(manifest)).shards), ranks * workers
    except ManifestError as error:
        yield Finding(ERROR, one_line(error))
        return
    if count < needed:
        fewer = f"set hardware.loader_workers={count // ranks}, " if count >= ranks else ""
        yield Finding(
            ERROR,
            f"data.manifest={manifest}: {count} shards, fewer than {ranks} processes x hardware.loader_workers="
            f"{workers}; {fewer}start fewer processes, or download with a smaller data.download.samples_per_shard",
        )
    else:
        yield Finding(OK, f"data.manifest={manifest}: {count:,} shards, loader workers: {needed:,}")
    if settled:
        yield from _streams(config, ranks)


def start_and_room(config: TrainConfig, raw_config: DictConfig, settled: bool = True) -> Iterator[Finding]:
    """Is what the stage starts from there and whole, and is there room for the checkpoints to come?

    Whole means here that every file is there and has the size in the checkpoint's record, whose own checksum is right:
    20 GB on a slow disk are not read. The run itself checks every byte before it uses them, each process its share.

    Args:
        settled: False where the settings are mistaken, and nothing can be built from them.
    """
    # Late, for they import PyTorch.
    from vdtrain.run.distributed import SharedError
    from vdtrain.training.start import check_frozen, resolve_start

    own, damages = latest_by_sizes(Path(config.run_dir) / CHECKPOINTS)
    if own is None and config.stage.init_from is not None:
        damages += latest_by_sizes(Path(config.stage.init_from) / CHECKPOINTS)[1]
    for line in damages:
        yield Finding(WARNING, f"{line}; it is passed over")
    try:
        start = resolve_start(config, raw_config, verify_checksums=False)
        step = 0 if start.position is None else start.position.step
        yield Finding(OK, _origin(config, start, step))
        for line in start.remarks:
            yield Finding(WARNING, line)
        if settled:
            for line in check_frozen(start, config):
                yield Finding(WARNING, line)
            yield room(config, start, step)
    except (ConfigError, SharedError) as error:
        yield Finding(ERROR, str(error))
    except CheckpointError as error:
        setting = f"stage.init_from={config.stage.init_from}"
        yield Finding(ERROR, f"{setting}: {error}; give another checkpoint, or train that stage again")


def in_use(config: TrainConfig) -> Iterator[Finding]:
    """A line if another job is at work in the run folder; takes minutes where that is not certain."""
    try:
        held = RunLock(Path(config.run_dir)).held()
    except OSError as error:
        # What cannot be written either, `room` says.
        run_dir = Path(config.run_dir)
        held = None if output_problem(run_dir) else f"run_dir={run_dir}: {unreadable(error, run_dir)}"
    if held is not None:
        yield Finding(ERROR, held)


def room(config: TrainConfig, start: Start, step: int) -> Finding:
    """Has the disk room for the checkpoints to come, and for the one that is written before an old one goes?

    A quota is not seen here.

    Raises:
        ConfigError, CheckpointError: the weights that the stage starts from are of another model, or damaged.
    """
    if problem := output_problem(Path(config.run_dir)):
        return Finding(ERROR, f"run_dir={config.run_dir}: {problem}")
    size = checkpoint_size(config, start)
    run_dir = Path(config.run_dir).absolute()
    place = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    free, number = shutil.disk_usage(place).free, _checkpoints_to_come(config, step, config.checkpoint.keep)
    sizes = f"{number} checkpoints of {size / GB:.2f} GB"
    if number * size <= free:
        return Finding(OK, f"run_dir={config.run_dir}: {free / GB:,.1f} GB free for {sizes} to come")
    # As many as fit: the number to come grows with that of those kept.
    keep = bisect_right(
        range(1, config.checkpoint.keep), free // size, key=lambda keep: _checkpoints_to_come(config, step, keep)
    )
    smaller = f"set checkpoint.keep={keep}, " if keep else ""
    return Finding(
        ERROR,
        f"run_dir={config.run_dir}: {free / GB:,.1f} GB free, and {sizes} to come take {number * size / GB:,.1f} GB; "
        f"{smaller}make room, or choose another folder",
    )


def checkpoint_size(config: TrainConfig, start: Start) -> int:
    """Bytes of one checkpoint: as large as the one that is continued, else by the networks, laid out without memory.

    Raises:
        ConfigError, CheckpointError: see `room`.
    """
    import torch

    from vdtrain.engine.partitions import GroupLayout
    from vdtrain.models.diffuser import Diffuser, parameters_by_group
    from vdtrain.planning.memory import checkpoint_bytes, tensor_bytes
    from vdtrain.training.build import check_weights, initial_weights, layer_groups

    if start.resume is not None:
        return start.resume.bytes
    weights = initial_weights(start, config.model, verify_checksums=False)
    with torch.device("meta"):
        diffuser = Diffuser(config.model, layer_groups(config, weights))
    check_weights(diffuser, weights)
    groups = parameters_by_group(diffuser)
    trained = {group: groups[group] for group in active_groups(stage_flows(config))}
    layouts = [GroupLayout.of(group, parameters) for group, parameters in trained.items()]
    carried = tensor_bytes(diffuser) - FLOAT32 * sum(layout.numel for layout in layouts)
    return checkpoint_bytes(config, layouts) + carried


def tracking(config: TrainConfig) -> Finding:
    """Can the run be tracked, or how will it be? A run that is under way does not wait for W&B."""
    problem, mode = wandb_problem(config.tracking), f"tracking.mode={config.tracking.mode}"
    if problem is not None:
        if latest_by_sizes(Path(config.run_dir) / CHECKPOINTS)[0] is None:
            return Finding(ERROR, problem)
        kept = f"{config.run_dir}/metrics.jsonl"
        return Finding(WARNING, f"{problem}; training goes on: its figures are in {kept}, and a later start sends them")
    texts = {
        "online": "W&B is reached, and takes the credentials here",
        "offline": f"send the run to W&B by `wandb sync {shell([config.run_dir])}/wandb/offline-run-*`",
        "disabled": f"figures go to {config.run_dir}/metrics.jsonl alone",
    }
    return Finding(OK, f"{mode}: {texts.get(config.tracking.mode, '')}")


def _streams(config: TrainConfig, ranks: int) -> Iterator[Finding]:
    """A line on each phase whose stream cannot be opened; no sample is read."""
    from vdtrain.data.loading import data_problem, open_stream
    from vdtrain.data.stream import StreamError

    for index in range(len(config.stage.phases)):
        try:
            stream = open_stream(config, index, rank=0, world_size=ranks)
        except (ManifestError, StreamError, ConfigError, OSError) as error:
            yield Finding(ERROR, f"stage.phases.{index}: {data_problem(error, config.data.manifest)}")
        else:
            stream.close()


def _extent(config: TrainConfig, ranks: int) -> str:
    steps = sum(phase_steps(config, phase) for phase in config.stage.phases)
    batch = config.stage.global_batch_size
    return f"{config.stage.name}: {ranks} x {config.hardware.name}, {steps:,} steps of {batch:,} pairs"


def _origin(config: TrainConfig, start: Start, step: int) -> str:
    if start.resume is not None:
        return f"run_dir={config.run_dir}: continues from step {step}, {start.resume}"
    if start.weights is not None:
        return f"stage.init_from={config.stage.init_from}: {start.weights}"
    return "stage.init_from=null: starts from random weights"


def _checkpoints_to_come(config: TrainConfig, step: int, keep: int) -> int:
    """The most that will be there at once and are not there yet, if `keep` of them stay."""
    settings = config.checkpoint
    total = sum(phase_steps(config, phase) for phase in config.stage.phases)
    # One at every interval and one at the end of each phase.
    saves = max(0, total - step) // settings.every_steps + len(config.stage.phases)
    saves = saves if step < total else 0
    every = settings.keep_every_steps
    kept = total // every - step // every if every else 0
    there = len(candidates(Path(config.run_dir) / CHECKPOINTS))
    return min(saves, keep + 1 - min(there, keep) + kept)
