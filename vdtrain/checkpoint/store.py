"""Saving and resuming a run. A checkpoint is published as a whole or not at all.

Every process writes its own partition into `step-000000123.incomplete`. When every file is on the disk, rank 0 writes
the index, renames the folder to `step-000000123`, and then moves `latest` to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum, IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdtrain.checkpoint.folder import (
    LATEST_FILE,
    NAME,
    CheckpointError,
    UnreadableError,
    candidates,
    check_files,
    check_name,
    checkpoint_name,
    latest_name,
    step_of,
    summary,
)
from vdtrain.checkpoint.format import CARRIED_OVER_FILE, Checkpoint, Index, SliceReader, shard_name, write_tensors
from vdtrain.engine.engine import Engine, ShardEMA
from vdtrain.engine.flat import EMA, MASTER, GroupLayout, cut
from vdtrain.errors import ConfigError, one_line, system_error, unwritable
from vdtrain.files import INCOMPLETE, REPLACED, FileRecord, sync, write_text
from vdtrain.run import distributed
from vdtrain.run.pulse import moved
from vdtrain.tracking.summary import note_saved


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
        steps = engine.group_steps
        most = max(steps.values())
        index = Index(
            step=step,
            world_size=distributed.world_size(),
            zero_stage=engine.settings.zero_stage,
            precision=engine.settings.precision,
            optimizer_steps=most,
            ema_updates=None if ema is None else ema.updates,
            trainer=trainer_state,
            groups=tuple(partition.layout for partition in partitions),
            files={},
            group_steps={group: count for group, count in steps.items() if count < most},
        )
        # What is carried over does not change while the engine lives.
        return cls(index, memory.copy(buffers), engine.carried_over)


# Every process's value, by rank, on every process.
Gather = Callable[[Any], list[Any]]
# How long an error that may pass is waited for, by default, and the pause between two tries.
PATIENCE_SECONDS = 15.0
RETRY_SECONDS = 2.0

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run.

    In a process group, all processes call each method together, and all succeed or fail together.

    Args:
        folder: on a file system that every process sees.
        keep: number of checkpoints to keep, the newest included.
        keep_every_steps: also keep those of every step that it divides; None keeps no others.
        passed_over: names of those that were found damaged when the run started.
    """

    def __init__(
        self, folder: Path, keep: int, keep_every_steps: int | None = None, passed_over: Iterable[str] = ()
    ) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint.keep: {keep} would remove the newest checkpoint; keep at least 1")
        self.folder = folder
        self.keep = keep
        self.keep_every_steps = keep_every_steps
        self.passed_over = set(passed_over)

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
            """The results of all processes by rank, or an error on every process if one of them failed."""
            result, failure = None, None
            try:
                result = action()
            # Any error: a process that skips the exchange would leave the others waiting.
            except Exception as error:
                failure = f"process {distributed.rank()}: {_said(error, self.folder)}"
            outcomes = gather([result, failure])
            if failed := next((line for _, line in outcomes if line), None):
                step = snapshot.index.step
                raise CheckpointError(f"{self.folder}: the checkpoint of step {step} was not saved: {failed}")
            return [made for made, _ in outcomes]

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
        self.passed_over.discard(final.name)
        # Processes that were done before would wait for this without a sign of work.
        together(lambda: self._prune(final) if first else None)
        return final

    def _prepare(self, draft: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"*{INCOMPLETE}"):
            if left.is_dir():
                _remove(left)
                # What is left would be taken for a part of the new one.
                shutil.rmtree(left, ignore_errors=not left.exists())
            else:
                left.unlink()
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
        _remove(replaced)
        # The checkpoint is complete even if the note cannot be written.
        with contextlib.suppress(OSError):
            note_saved(self.folder.parent, step_of(final))

    def _prune(self, newest: Path) -> None:
        """Remove checkpoints that no rule keeps. Those after `newest` stay: the run was set back.

        A damaged one is not counted, and goes when a whole one has taken its place. What cannot be read stays.
        """
        whole: list[Path] = []
        damaged: list[Path] = []
        try:
            older = sorted(path for path in candidates(self.folder) if path.name < newest.name)
        except UnreadableError:
            return
        for path in older:
            try:
                if summary(path).step == step_of(path):
                    (damaged if path.name in self.passed_over else whole).append(path)
            except UnreadableError:
                continue
            except CheckpointError:
                damaged.append(path)
        surplus = whole[: max(0, len(whole) - (self.keep - 1))]
        every = self.keep_every_steps
        for path in [*damaged, *(path for path in surplus if every is None or step_of(path) % every)]:
            _remove(path)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, as far as that is possible. The removal of a large file takes long."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            path.unlink()
            moved()
    shutil.rmtree(folder, ignore_errors=True)


class Verification(Enum):
    """How a checkpoint is checked before it is used.

    SIZES compares the sizes of its files. ALONE reads every byte in this process. TOGETHER reads every byte, each
    process its share: all processes must call it.
    """

    SIZES, ALONE, TOGETHER = range(3)


def latest(
    folder: Path, check: Verification = Verification.TOGETHER, patience: float = PATIENCE_SECONDS
) -> Checkpoint | None:
    """The checkpoint to resume from: the one that `latest` names, or the newest whole one if that is damaged.

    Args:
        patience: how many seconds an error that may pass is waited for; not for a check of SIZES.

    Returns:
        None if the folder holds no checkpoint, whole or damaged.

    Raises:
        UnreadableError: a checkpoint that may be whole cannot be read, or a newer version of vdtrain wrote it.
        CheckpointError: all are damaged.
    """
    names, named = looked(
        check, lambda: ([path.name for path in candidates(folder)], latest_name(folder)), patience, folder
    )
    said = check is not Verification.SIZES and distributed.rank() == 0
    if said and NAME.fullmatch(named) and named not in names:
        logger.warning("checkpoint %s is passed over: %s names it, and it is not there", named, LATEST_FILE)
    damages: dict[str, str] = {}
    for name in names:
        path = folder / name
        try:
            found = verify(path, check, patience)
            check_name(path, found.index.step)
            return replace(found, passed_over=tuple(damages))
        except UnreadableError as error:
            older = f", or move {path} away to go on from an older one" if name != names[-1] else ""
            raise UnreadableError(f"{error}{older}") from error
        except CheckpointError as error:
            damages[name] = str(error)
            if said:
                logger.warning("checkpoint %s is passed over: %s", name, error)
    if damages:
        raise CheckpointError(next(iter(damages.values())))
    return None


def looked(check: Verification, look: Callable[[], Any], patience: float, path: Path = Path()) -> Any:
    """What a look at files finds: after a check TOGETHER, what rank 0 finds, on every process.

    Raises:
        UnreadableError: they cannot be read.
    """
    if check is Verification.TOGETHER:
        return distributed.on_first(lambda: patiently(look, path, patience))
    return patiently(look, path, 0.0 if check is Verification.SIZES else patience)


def patiently(action: Callable[[], Any], path: Path, patience: float) -> Any:
    """The result of a reading action, which is repeated while its error may pass.

    Raises:
        UnreadableError: it did not pass within `patience` seconds, or cannot pass.
    """
    deadline, warned = time.monotonic() + patience, False
    while True:
        try:
            return action()
        except (OSError, UnreadableError) as error:
            found = error if isinstance(error, UnreadableError) else UnreadableError.of(error, path)
            if not found.passes or time.monotonic() >= deadline:
                raise found from error
            if not warned:
                logger.warning("%s; trying again for %g s", found, patience)
            warned = True
        time.sleep(min(RETRY_SECONDS, patience / 4))


class Outcome(IntEnum):
    """What a process found at a checkpoint; the highest of all processes counts."""

    WHOLE, DAMAGED, PASSING, UNREADABLE = range(4)


def verify(path: Path, check: Verification = Verification.TOGETHER, patience: float = PATIENCE_SECONDS) -> Checkpoint:
    """Check the files of a checkpoint.

    Args:
        patience: how many seconds an error that may pass is waited for; not for a check of SIZES.

    Raises:
        CheckpointError: a file is damaged; after a check TOGETHER, on every process.
        UnreadableError: a file cannot be read, or a newer version of vdtrain wrote it; likewise.
    """
    if check is Verification.SIZES:
        return Checkpoint.open(path)
    together, deadline = check is Verification.TOGETHER, time.monotonic() + patience
    share = slice(distributed.rank(), None, distributed.world_size()) if together else slice(None)
    found, own, line, warned = None, Outcome.PASSING, "", False
    while True:
        if own is Outcome.PASSING:
            try:
                index = Index.read(path)
                check_files(path, index.files, sorted(index.files)[share])
                found, own, line = Checkpoint(path, index, verified=True), Outcome.WHOLE, ""
            except UnreadableError as error:
                own, line = Outcome.PASSING if error.passes else Outcome.UNREADABLE, str(error)
            except CheckpointError as error:
                own, line = Outcome.DAMAGED, str(error)
        said: list[Any] = [own, line, time.monotonic() >= deadline]
        outcomes = distributed.gather_json(said) if together else [said]
        worst, reason = max(((int(kind), str(text)) for kind, text, _ in outcomes), key=lambda outcome: outcome[0])
        if worst == Outcome.WHOLE and found is not None:
            return found
        if worst == Outcome.DAMAGED:
            raise CheckpointError(reason)
        # Rank 0's clock decides for all.
        if worst == Outcome.UNREADABLE or outcomes[0][2]:
            raise UnreadableError(reason)
        if not warned and (distributed.rank() == 0 or not together):
            logger.warning("%s; trying again for %g s", reason, patience)
        warned = True
        time.sleep(min(RETRY_SECONDS, patience / 4))


def load(checkpoint: Checkpoint, engine: Engine, ema: ShardEMA | None) -> None:
    """Bring the engine and the EMA to where they stood when the checkpoint was written.

    The number of processes and the ZeRO stage may differ from those that wrote it, and so may the frozen layer groups:
    what was frozen there and is trained here starts with no optimiser state.

    Raises:
        CheckpointError: the checkpoint is damaged, or was written by a stage that trains other layers.
    """
    if not checkpoint.verified:
        checkpoint = verify(checkpoint.path)
    path, index = checkpoint.path, checkpoint.index
    own = {partition.layout.group: partition.layout for partition in engine.partitions()}
    theirs = {layout.group: layout for layout in index.groups}
    thawed, frozen = [group for group in own if group not in theirs], [group for group in theirs if group not in own]
    failure = None
    try:
        weights = checkpoint.unchecked_weights("model")
        if (difference := _difference(index, weights, own, engine.carried_over_names)) is not None:
            raise CheckpointError(f"{path}: {difference}; start from it by stage.init_from instead")
        engine.load_carried_over(weights.renamed({name: name for name in engine.carried_over_names}))
        reader = SliceReader(path, index)

        def read(group: str, kind: str, start: int, stop: int) -> Tensor:
            if group in theirs:
                return own[group].read(theirs[group], partial(reader.read_finite, group, kind), start, stop)
            # The average of weights that did not change is these weights.
            kept = kind in (MASTER, EMA)
            return cut(weights, own[group], start, stop) if kept else torch.zeros(stop - start)

        if ema is not None and index.ema_updates is not None:
            ema.load(read, index.ema_updates)
    except (CheckpointError, ConfigError, OSError) as error:
        failure = one_line(error)
    if (failed := distributed.first_failure(failure)) is not None:
        raise CheckpointError(failed)
    first = distributed.rank() == 0
    if thawed and first:
        logger.warning("%s: frozen until now, so the optimiser state starts at zero", ", ".join(thawed))
    if frozen and first:
        logger.warning("%s: frozen from now on, so the optimiser state is left out", ", ".join(frozen))
    with reader:
        engine.load_partitions(read, {group: index.steps_of(group) for group in own})
    if ema is not None and index.ema_updates is None:
        logger.warning("%s holds no EMA: the EMA starts at its weights", path)
        ema.restart()


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


def _difference(
    index: Index, weights: Iterable[str], own: Mapping[str, GroupLayout], carried_over: Iterable[str]
) -> str | None:
    """A line on how the weights of a checkpoint differ from the engine's; None if they do not."""
    trained = {slot.name for layout in own.values() for slot in layout.slots}
    if strange := {*trained, *carried_over} ^ set(weights):
        theirs = ", ".join(layout.group for layout in index.groups)
        return (
            f"{min(strange)} is in only one of checkpoint and model; it was written by a stage that trains {theirs}, "
            f"and this one trains {', '.join(own)}"
        )
    changed = [layout.group for layout in index.groups if own.get(layout.group, layout) != layout]
    return (
        f"the parameters of {', '.join(changed)} have other names or shapes in it than in this model"
        if changed
        else None
    )
