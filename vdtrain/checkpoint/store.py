"""Saving and resuming a run. A checkpoint is published as a whole or not at all.

Every process writes its own partition into `step-000000123.incomplete`. When every file is on the disk, rank 0 writes
the index, renames the folder to `step-000000123`, and then moves `latest` to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdtrain.checkpoint.folder import LATEST_FILE, CheckpointError, candidates, checkpoint_name, step_of
from vdtrain.checkpoint.format import CARRIED_OVER_FILE, Checkpoint, Index, SliceReader, shard_name, write_tensors
from vdtrain.engine.engine import Engine, ShardEMA
from vdtrain.engine.partitions import EMA
from vdtrain.errors import one_line, system_error, unwritable
from vdtrain.files import INCOMPLETE, REPLACED, FileRecord, damage, sync, write_text
from vdtrain.run import distributed
from vdtrain.run.records import note_saved


class HostMemory:
    """CPU buffers, allocated once and reused for every copy; pinned if the tensors are on a GPU.

    They take 16 bytes per weight of this process's partition: weight, two moments and EMA.
    """

    def __init__(self) -> None:
        self._places: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, complete on return; the next call overwrites them."""
        for name, tensor in tensors.items():
            if name not in self._places:
                self._places[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._places[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self._places[name] for name in tensors}


@dataclass(frozen=True)
class Snapshot:
    """One process's share of a checkpoint.

    Attributes:
        index: of the whole checkpoint, without the file records.
        partitions: "GROUP/KIND" -> this process's flat partition, float32.
        carried_over: parameters that the stage does not train, by name; empty except on rank 0.
    """

    index: Index
    partitions: Mapping[str, Tensor]
    carried_over: Mapping[str, Tensor]

    @classmethod
    def take(
        cls,
        engine: Engine,
        ema: ShardEMA | None,
        trainer_state: dict[str, Any],
        step: int,
        memory: HostMemory,
    ) -> Snapshot:
        """Copy the present values of the engine and the EMA; training may continue at once."""
        partitions = engine.partitions()
        buffers: dict[str, Tensor] = {}
        for position, partition in enumerate(partitions):
            group = partition.layout.group
            buffers |= {f"{group}/{kind}": buffer for kind, buffer in partition.buffers.items()}
            if ema is not None:
                buffers[f"{group}/{EMA}"] = ema.buffers[position]
        index = Index(
            step=step,
            world_size=distributed.world_size(),
            zero_stage=engine.settings.zero_stage,
            precision=engine.settings.precision,
            optimizer_steps=engine.optimizer_steps,
            ema_updates=None if ema is None else ema.updates,
            trainer=trainer_state,
            groups=tuple(partition.layout for partition in partitions),
            files={},
        )
        # What is carried over does not change while the engine lives.
        return cls(index, memory.copy(buffers), engine.carried_over)


# Every process's value, by rank, on every process.
Gather = Callable[[Any], list[Any]]

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run.

    In a process group, all processes call each method together, and all succeed or fail together.

    Args:
        folder: on a file system that every process sees.
        keep: number of checkpoints to keep, the newest included.
        keep_every_steps: also keep those of every step that it divides; None keeps no others.
    """

    def __init__(self, folder: Path, keep: int, keep_every_steps: int | None = None) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint.keep: {keep} would remove the newest checkpoint; keep at least 1")
        self.folder = folder
        self.keep = keep
        self.keep_every_steps = keep_every_steps

    def write(self, snapshot: Snapshot, gather: Gather = distributed.gather_json) -> Path:
        """Write a checkpoint, make it the latest, and remove surplus ones.

        Args:
            snapshot: this process's share. Its step names the checkpoint; one of the same step is replaced.
            gather: the exchange between processes, for example over a group of the calling thread.

        Raises:
            CheckpointError: on every process, if one of them failed. Earlier checkpoints are untouched, and training
                may continue.
        """
        final = self.folder / checkpoint_name(snapshot.index.step)
        draft = final.with_name(final.name + INCOMPLETE)
        first = distributed.rank() == 0

        def together(action: Callable[[], Any]) -> list[Any]:
            return _together(action, gather, self.folder, f"the checkpoint of step {snapshot.index.step}")

        try:
            together(lambda: self._prepare(draft) if first else None)
            records: dict[str, FileRecord] = {}
            for written in together(lambda: _write_own_files(draft, snapshot)):
                records.update({name: FileRecord(**record) for name, record in written.items()})
            index = replace(snapshot.index, files=records)
            together(lambda: self._publish(draft, final, index) if first else None)
        except CheckpointError:
            if first:
                shutil.rmtree(draft, ignore_errors=True)
            raise
        if first:
            self._prune(final)
        return final

    def _prepare(self, draft: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_drafts()
        draft.mkdir()

    def _publish(self, draft: Path, final: Path, index: Index) -> None:
        for name, record in index.files.items():
            size = (draft / name).stat().st_size
            if size != record.bytes:
                raise OSError(f"{draft / name} has {size} bytes here and {record.bytes} where it was written")
        index.write(draft)
        sync(draft)
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        draft.rename(final)
        sync(self.folder)
        pointer = self.folder / (LATEST_FILE + INCOMPLETE)
        write_text(pointer, final.name + "\n")
        os.replace(pointer, self.folder / LATEST_FILE)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        # The checkpoint is complete even if the note cannot be written.
        with contextlib.suppress(OSError):
            note_saved(self.folder.parent, step_of(final))

    def _prune(self, newest: Path) -> None:
        """Remove checkpoints that no rule keeps. Those after `newest` stay: the run was set back."""
        older = sorted(path for path in candidates(self.folder) if path.name < newest.name)
        for path in older[: max(0, len(older) - (self.keep - 1))]:
            if self.keep_every_steps is None or step_of(path) % self.keep_every_steps:
                shutil.rmtree(path, ignore_errors=True)

    def _remove_drafts(self) -> None:
        for draft in self.folder.glob(f"*{INCOMPLETE}"):
            if draft.is_dir():
                shutil.rmtree(draft)
            else:
                draft.unlink()


class Verification(Enum):
    """How a checkpoint is checked before it is used.

    SIZES compares the sizes of its files. ALONE reads every byte in this process. TOGETHER reads every byte, each
    process its share: all processes must call it.
    """

    SIZES, ALONE, TOGETHER = range(3)


def latest(folder: Path, check: Verification = Verification.TOGETHER) -> Checkpoint | None:
    """The checkpoint to resume from: the one that `latest` names, or the newest whole one if that is damaged.

    Args:
        folder: of a run's checkpoints.
    """
    paths = candidates(folder)
    if check is Verification.TOGETHER:
        paths = [Path(path) for path in distributed.broadcast_json([str(path) for path in paths])]
    for path in paths:
        try:
            return verify(path, check)
        except CheckpointError as error:
            if check is not Verification.SIZES and distributed.rank() == 0:
                logger.warning("checkpoint %s is passed over: %s", path.name, error)
    return None


def verify(path: Path, check: Verification = Verification.TOGETHER) -> Checkpoint:
    """Check the files of a checkpoint.

    Raises:
        CheckpointError: a file is damaged; after a check TOGETHER, on every process.
    """
    if check is Verification.SIZES:
        return Checkpoint.open(path)
    together = check is Verification.TOGETHER
    found, damaged = None, None
    try:
        index = Index.read(path)
        share = slice(distributed.rank(), None, distributed.world_size()) if together else slice(None)
        damaged = damage(path, index.files, sorted(index.files)[share])
        found = Checkpoint(path, index, verified=True)
    except CheckpointError as error:
        damaged = str(error)
    damages = [each for each in (distributed.gather_json(damaged) if together else [damaged]) if each]
    if damages or found is None:
        raise CheckpointError(damages[0])
    return found


def load(checkpoint: Checkpoint, engine: Engine, ema: ShardEMA | None) -> None:
    """Bring the engine and the EMA to where they stood when the checkpoint was written.

    The number of processes and the ZeRO stage may differ from those that wrote it.

    Raises:
        CheckpointError: the checkpoint is damaged, or was written by a stage that trains other layers.
    """
    if not checkpoint.verified:
        checkpoint = verify(checkpoint.path)
    path, index = checkpoint.path, checkpoint.index
    own = tuple(partition.layout for partition in engine.partitions())
    if index.groups != own:
        raise CheckpointError(f"{path}: {_difference(index, engine)}; start from it by stage.init_from instead")
    carried_over = checkpoint.carried_over()
    if carried_over.keys() != engine.carried_over_names:
        strange = min(carried_over.keys() ^ engine.carried_over_names)
        raise CheckpointError(f"{path}: {strange} is not trained here, and only one of checkpoint and model has it")
    engine.load_carried_over(carried_over)
    with SliceReader(path, index) as reader:
        engine.load_partitions(reader.read, index.optimizer_steps)
        if ema is not None and index.ema_updates is not None:
            ema.load(reader.read, index.ema_updates)
        elif ema is not None:
            logger.warning("%s holds no EMA: the EMA starts at its weights", path)
            ema.restart()


def _together(action: Callable[[], Any], gather: Gather, folder: Path, what: str) -> list[Any]:
    """Run `action` on every process: its results by rank, or an error on every process if one of them failed.

    Args:
        folder: the written folder, for the error.
    """
    result, failure = None, None
    try:
        result = action()
    # Any error: a process that skips the exchange would leave the others waiting.
    except Exception as error:
        failure = f"process {distributed.rank()}: {_said(error, folder)}"
    outcomes = gather({"result": result, "failure": failure})
    failures = [outcome["failure"] for outcome in outcomes if outcome["failure"]]
    if failures:
        raise CheckpointError(f"{folder}: {what} was not saved: {failures[0]}")
    return [outcome["result"] for outcome in outcomes]


def _said(error: Exception, folder: Path) -> str:
    found = system_error(error)
    if found is None:
        return f"{type(error).__name__}: {one_line(error)}; see its log"
    return unwritable(found, folder if found.filename is None else Path(str(found.filename)), "")


def _write_own_files(draft: Path, snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """Write this process's partition, and on rank 0 what the stage carries over.

    Returns:
        The record of each file by name, as JSON.
    """
    name = shard_name(distributed.rank(), distributed.world_size())
    records = {name: write_tensors(draft / name, snapshot.partitions)}
    if snapshot.carried_over:
        records[CARRIED_OVER_FILE] = write_tensors(draft / CARRIED_OVER_FILE, snapshot.carried_over)
    return {name: asdict(record) for name, record in records.items()}


def _difference(index: Index, engine: Engine) -> str:
    """A line on how the layer groups of a checkpoint differ from the engine's."""
    theirs = [layout.group for layout in index.groups]
    ours = [partition.layout.group for partition in engine.partitions()]
    if theirs != ours:
        return f"was written by a stage that trains {', '.join(theirs)}; this one trains {', '.join(ours)}"
    changed = [
        layout.group
        for layout, partition in zip(index.groups, engine.partitions(), strict=True)
        if layout != partition.layout
    ]
    return f"the parameters of {', '.join(changed)} have other names or shapes in it than in this model"
