"""The checks of `vdtrain preflight`: configuration, start, shards, disk space and tracker."""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from vdtrain.checkpoint.folder import CHECKPOINTS, CheckpointError, candidates, latest_by_sizes
from vdtrain.config.command_line import shell
from vdtrain.config.compose import ConfigError
from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import phase_steps, problems, reads_index, warmup_samples
from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.errors import missing, one_line, output_problem, unreadable
from vdtrain.redaction import without_secrets
from vdtrain.run.lock import RunLock
from vdtrain.tracking.wandb_run import wandb_problem

if TYPE_CHECKING:
    from vdtrain.data.stream import PairStream
    from vdtrain.training.start import Start

GB, FLOAT32 = 10**9, 4
# Shards that are looked at, and the longest time for the answer of a store.
LOOKED_AT, LOOK_SECONDS = 8, 10.0
OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Check:
    """The result of a check: `kind` is "ok", "warning" or "error"."""

    kind: str
    line: str


def checks(config: TrainConfig, raw_config: DictConfig, ranks: int) -> Iterator[Check]:
    """Run all checks, the cheapest first; an error does not end them.

    Args:
        raw_config: the composed configuration, unresolved.
        ranks: number of processes that will train.
    """
    mistakes = list(dict.fromkeys(problems(config, ranks)))
    yield from (Check(ERROR, line) for line in mistakes)
    if not mistakes:
        yield Check(OK, _extent(config, ranks))
        yield from warm_up(config)
    if not reads_index(config):
        yield from _streams(config, ranks) if not mistakes else ()
    elif not any(line.startswith("data.manifest=") for line in mistakes):
        yield from data(config, ranks, valid=not mistakes)
    yield from in_use(config)
    yield from start_and_room(config, raw_config, valid=not mistakes)
    yield tracking(config)


def warm_up(config: TrainConfig) -> Iterator[Check]:
    """Does the warm-up end before the stage does?"""
    total = sum(phase_steps(config, phase) for phase in config.stage.phases) * config.stage.global_batch_size
    if warmup_samples(config) > total:
        yield Check(
            WARNING,
            f"optimizer.warmup_samples={config.optimizer.warmup_samples}: the stage has {total:,} samples "
            "and ends before the warm-up does; set a smaller number",
        )


def data(config: TrainConfig, ranks: int, valid: bool = True) -> Iterator[Check]:
    """Are there as many shards as loader workers, can every phase's stream be opened, and are its shards there?

    With fewer shards than workers, several workers read the same file.

    Args:
        valid: False if the settings have errors, so that no stream can be opened.
    """
    manifest, workers = config.data.manifest, config.hardware.loader_workers
    try:
        count, needed = len(Manifest(Path(manifest)).shards), ranks * workers
    except ManifestError as error:
        yield Check(ERROR, one_line(error))
        return
    if count < needed:
        yield Check(
            WARNING,
            f"data.manifest={manifest}: {count} shards, fewer than {ranks} processes x hardware.loader_workers="
            f"{workers}: several read the same shard, which is slow on some disks; smaller shards are read better",
        )
    else:
        yield Check(OK, f"data.manifest={manifest}: {count:,} shards, loader workers: {needed:,}")
    if valid:
        yield from _streams(config, ranks)


def start_and_room(config: TrainConfig, raw_config: DictConfig, valid: bool = True) -> Iterator[Check]:
    """Is the start of the stage complete, and is there disk space for the checkpoints to come?

    Complete means that every file has the size in the checkpoint's record, and that the checksum of the record is
    right. The files are not read: they may be 20 GB on a slow disk. The run itself verifies their checksums.

    Args:
        valid: False if the settings have errors, so that nothing can be built from them.
    """
    # Late, for they import PyTorch.
    from vdtrain.checkpoint.store import Verification
    from vdtrain.run.distributed import SharedError
    from vdtrain.training.start import check_frozen, resolve_start

    own, damages = latest_by_sizes(Path(config.run_dir) / CHECKPOINTS)
    if own is None and config.stage.init_from is not None:
        damages += latest_by_sizes(Path(config.stage.init_from) / CHECKPOINTS)[1]
    try:
        start = resolve_start(config, raw_config, Verification.SIZES)
        for line in damages:
            yield Check(WARNING, f"{line}; it is passed over")
        step = 0 if start.position is None else start.position.step
        yield Check(OK, _origin(config, start, step))
        for line in start.remarks:
            yield Check(WARNING, line)
        if valid:
            for line in check_frozen(start, config):
                yield Check(WARNING, line)
            yield room(config, start, step)
    except (ConfigError, SharedError, CheckpointError) as error:
        yield Check(ERROR, str(error))


def in_use(config: TrainConfig) -> Iterator[Check]:
    """Is another job using the run folder? Takes minutes if that is uncertain."""
    try:
        held = RunLock(Path(config.run_dir)).held()
    except OSError as error:
        # `room` reports a folder that cannot be written.
        run_dir = Path(config.run_dir)
        held = None if output_problem(run_dir) else f"run_dir={run_dir}: {unreadable(error, run_dir)}"
    if held is not None:
        yield Check(ERROR, held)


def room(config: TrainConfig, start: Start, step: int) -> Check:
    """Is there disk space for the checkpoints to come, and for one more before an old one is removed?

    Quotas are not checked.

    Raises:
        ConfigError, CheckpointError: the weights that the stage starts from are of another model, or damaged.
    """
    if problem := output_problem(Path(config.run_dir)):
        return Check(ERROR, f"run_dir={config.run_dir}: {problem}")
    size = checkpoint_size(config, start)
    run_dir = Path(config.run_dir).absolute()
    place = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    free, number = shutil.disk_usage(place).free, _checkpoints_to_come(config, step, config.checkpoint.keep)
    sizes = f"{number} checkpoints of {size / GB:.2f} GB"
    if number * size <= free:
        return Check(OK, f"run_dir={config.run_dir}: {free / GB:,.1f} GB free for {sizes} to come")
    # The largest `keep` that fits: more kept checkpoints mean more to come.
    keep = bisect_right(
        range(1, config.checkpoint.keep), free // size, key=lambda keep: _checkpoints_to_come(config, step, keep)
    )
    smaller = f"set checkpoint.keep={keep}, " if keep else ""
    return Check(
        ERROR,
        f"run_dir={config.run_dir}: {free / GB:,.1f} GB free, and {sizes} to come take {number * size / GB:,.1f} GB; "
        f"{smaller}make room, or choose another folder",
    )


def checkpoint_size(config: TrainConfig, start: Start) -> int:
    """Bytes of one checkpoint: those of the continued one, else computed from the networks on the meta device.

    Raises:
        ConfigError, CheckpointError: see `room`.
    """
    import torch

    from vdtrain.engine.flat import GroupLayout
    from vdtrain.models.diffuser import Diffuser
    from vdtrain.models.trained import trained_parameters
    from vdtrain.planning.dry_run import tensor_bytes
    from vdtrain.planning.memory import checkpoint_bytes
    from vdtrain.training.build import check_weights, initial_weights, layer_groups

    if start.resume is not None:
        return start.resume.bytes
    weights = initial_weights(start, config.model, verify_checksums=False)
    with torch.device("meta"):
        diffuser = Diffuser(config.model, layer_groups(config, weights))
    check_weights(diffuser, weights)
    layouts = [GroupLayout.of(*group) for group in trained_parameters(diffuser, config).items()]
    carried = tensor_bytes(diffuser) - FLOAT32 * sum(layout.numel for layout in layouts)
    return checkpoint_bytes(config, layouts) + carried


def tracking(config: TrainConfig) -> Check:
    """Can the run be tracked? For a run that continues, a problem is only a warning."""
    problem, mode = wandb_problem(config.tracking), f"tracking.mode={config.tracking.mode}"
    if problem is not None:
        if latest_by_sizes(Path(config.run_dir) / CHECKPOINTS)[0] is None:
            return Check(ERROR, problem)
        kept = f"{config.run_dir}/metrics.jsonl"
        return Check(WARNING, f"{problem}; training goes on: its figures are in {kept}, and a later start sends them")
    board = "figures go to TensorBoard's files and to" if config.tracking.tensorboard else "figures go only to"
    if config.tracking.tensorboard and (line := missing("tensorboardX")) is not None:
        return Check(ERROR, f"tracking.tensorboard=true: {line}, or set tracking.tensorboard=false")
    texts = {
        "online": "W&B answers and accepts the credentials",
        "offline": f"send the run to W&B by `wandb sync {shell([config.run_dir])}/wandb/offline-run-*`",
        "disabled": f"{board} {config.run_dir}/metrics.jsonl",
    }
    return Check(OK, f"{mode}: {texts.get(config.tracking.mode, '')}")


def _streams(config: TrainConfig, ranks: int) -> Iterator[Check]:
    """A line on each phase whose stream cannot be opened, and what the first has to say of its data."""
    from vdtrain.data.loading import data_problem, open_stream
    from vdtrain.data.stream import PairStream, StreamError

    for index in range(len(config.stage.phases)):
        try:
            stream = open_stream(config, index, rank=0, world_size=ranks, patience=0.0)
        except (ManifestError, StreamError, ConfigError, OSError) as error:
            yield Check(ERROR, f"stage.phases.{index}: {data_problem(error, config.data.manifest)}")
        else:
            if index == 0:
                yield from (Check(WARNING, line) for line in getattr(stream, "remarks", ()))
                yield from (Check(ERROR, line) for line in getattr(stream, "probe", list)())
                if isinstance(stream, PairStream):
                    yield _shards(config, stream)
            stream.close()


def _shards(config: TrainConfig, stream: PairStream) -> Check:
    """Are some of a stream's shards as they were indexed? They are looked at side by side, and each but once."""
    from vdtrain.data.shards import INDEX_AGAIN, ShardReader, StreamError

    timeout, follow = min(LOOK_SECONDS, stream.timeout), config.data.stream.get("follow", ())
    reader = ShardReader(stream.manifest, timeout=timeout, patience=stream.patience, follow=follow)

    def look(shard: int) -> bool | str:
        try:
            return reader.look(shard)
        except (StreamError, ManifestError) as error:
            return one_line(error)

    chosen = stream.shards[:: -(-len(stream.shards) // LOOKED_AT)].tolist()
    with ThreadPoolExecutor(LOOKED_AT) as pool:
        found = list(pool.map(look, chosen))
    reader.close()
    root, number = config.data.stream.get("shard_root"), f"{len(found)} of {len(stream.shards):,} shards"
    setting = f"data.manifest={config.data.manifest}" if root is None else f"data.stream.shard_root={root}"
    setting = without_secrets(setting)
    wrong = [line for line in found if isinstance(line, str)]
    if wrong:
        return Check(
            ERROR, f"{setting}: {len(wrong)} of {len(found)} shards that were looked at cannot be used: {wrong[0]}"
        )
    if not all(found):
        return Check(
            WARNING,
            f"{setting}: {found.count(False)} of {len(found)} shards that were looked at have another time or header "
            f"than in the index; a run compares each whole, by its checksum, once. To spare that, {INDEX_AGAIN}",
        )
    return Check(OK, f"{setting}: {number} were looked at and are as indexed")


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
