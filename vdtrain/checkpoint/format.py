"""The checkpoint format: its files, its checks, and reading any slice of it.

    step-000000123/
        rank-00000-of-00002.safetensors    "GROUP/KIND" -> flat float32 partition, one file per process
        rank-00001-of-00002.safetensors
        passengers.safetensors             parameters that the stage did not train, by name; absent if there are none
        checkpoint.json                    the index, written last: if it exists, all other files are complete

A layer group's buffer does not depend on the number of processes, so any number of processes can read it back from the
partitions. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vdtrain.checkpoint.folder import (
    FORMAT,
    INDEX_FILE,
    CheckpointError,
    UnreadableError,
    check_files,
    file_records,
    index_checksum,
    read_index,
)
from vdtrain.engine.flat import DEEPSPEED_ALIGNMENT, EMA, MASTER, GroupLayout, ParameterSlot
from vdtrain.errors import one_line
from vdtrain.files import FileRecord, write_text
from vdtrain.models.frozen_weights import is_finite
from vdtrain.run.pulse import moved
from vdtrain.weights.tensor_files import DTYPES, Entry, LazyTensors, open_tensors

CARRIED_OVER_FILE = "passengers.safetensors"
# Bytes per write: small enough to notice a disk error soon, and to tell a slow disk from a dead one.
BLOCK_BYTES = 1 << 18
# Bytes between two waits for the disk. They adapt to its speed, so that a wait takes about a second.
LEAST_SYNC_BYTES, MOST_SYNC_BYTES = 1 << 24, 1 << 30
# Entries of an index that are JSON as they are.
PLAIN = ("step", "world_size", "zero_stage", "precision", "optimizer_steps", "ema_updates", "trainer")
SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Index:
    """Contents of checkpoint.json.

    Attributes:
        world_size: number of writing processes.
        optimizer_steps: updates applied by AdamW; see `steps_of` for a single layer group.
        ema_updates: updates of the EMA; None if there is no EMA.
        group_steps: by layer group, its updates if they are fewer, because it was frozen at first.
    """

    step: int
    world_size: int
    zero_stage: int
    precision: str
    optimizer_steps: int
    ema_updates: int | None
    trainer: dict[str, Any]
    groups: tuple[GroupLayout, ...]
    files: Mapping[str, FileRecord]
    group_steps: Mapping[str, int] = field(default_factory=dict)

    def steps_of(self, group: str) -> int:
        """Updates applied to a layer group; 0 if it has no state here."""
        trained = any(layout.group == group for layout in self.groups)
        return self.group_steps.get(group, self.optimizer_steps) if trained else 0

    def write(self, folder: Path) -> None:
        """Write checkpoint.json with its own checksum, and sync it to disk."""
        content = {
            "format": self._format(),
            **{name: getattr(self, name) for name in PLAIN},
            "group_steps": dict(self.group_steps),
            "groups": [
                {
                    "group": layout.group,
                    "numel": layout.numel,
                    **({} if layout.alignment == DEEPSPEED_ALIGNMENT else {"alignment": layout.alignment}),
                    "partitions": [layout.partition(rank, self.world_size) for rank in range(self.world_size)],
                    "parameters": [_slot_entry(slot) for slot in layout.slots],
                }
                for layout in self.groups
            ],
            "files": {name: asdict(file) for name, file in self.files.items()},
        }
        text = json.dumps({"sha256": index_checksum(content), "checkpoint": content}, indent=1)
        write_text(folder / INDEX_FILE, text)

    def _format(self) -> int:
        """The least format that tells everything, so that earlier versions read what they can."""
        if self.world_size > 1 and any(layout.alignment != DEEPSPEED_ALIGNMENT for layout in self.groups):
            return FORMAT
        return 2 if any(slot.channels_last for layout in self.groups for slot in layout.slots) else 1

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read checkpoint.json.

        Raises:
            CheckpointError: if it is missing or damaged; see `vdtrain.checkpoint.folder.read_index`.
        """
        content = read_index(folder)
        try:
            return cls(
                **{name: content[name] for name in PLAIN},
                groups=tuple(
                    GroupLayout(
                        str(entry["group"]),
                        tuple(
                            ParameterSlot(
                                str(p["name"]),
                                tuple(map(int, p["shape"])),
                                int(p["offset"]),
                                bool(p.get("channels_last", False)),
                            )
                            for p in entry["parameters"]
                        ),
                        int(entry.get("alignment", DEEPSPEED_ALIGNMENT)),
                    )
                    for entry in content["groups"]
                ),
                files=file_records(content),
                # Earlier versions have none.
                group_steps={str(name): int(count) for name, count in content.get("group_steps", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX_FILE}: is damaged ({error!r})") from error


def _slot_entry(slot: ParameterSlot) -> dict[str, Any]:
    entry = asdict(slot)
    return entry if slot.channels_last else {name: value for name, value in entry.items() if name != "channels_last"}


class SliceReader:
    """Reads any slice of a group's buffer, whatever number of processes wrote it."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._index = index
        self._layouts = {layout.group: layout for layout in index.groups}
        self._folder, self._open = folder, contextlib.ExitStack()
        with self._readable():
            self._files = [
                self._open.enter_context(safe_open(folder / shard_name(rank, index.world_size), framework="pt"))
                for rank in range(index.world_size)
            ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, group: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the buffer of `group`: float32, on the CPU. See engine.flat.BufferReader.

        Raises:
            CheckpointError: a file does not hold them.
        """
        parts = []
        with self._readable():
            for rank, file in enumerate(self._files):
                first, last = self._layouts[group].partition(rank, self._index.world_size)
                low, high = max(first, start), min(last, stop)
                if low < high:
                    parts.append(file.get_slice(f"{group}/{kind}")[low - first : high - first])
        return torch.cat(parts) if parts else torch.empty(0)

    def read_finite(self, group: str, kind: str, start: int, stop: int) -> Tensor:
        """The same.

        Raises:
            CheckpointError: a value is NaN or infinite, and training on would make nothing else.
        """
        found = self.read(group, kind, start, stop)
        if not is_finite(found):
            raise CheckpointError(
                f"{self._folder}: {kind} of {group} holds values that are NaN or infinite; remove it to resume from "
                "the checkpoint before it"
            )
        return found

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder}: its tensors cannot be read ({one_line(error)})") from error
        except OSError as error:
            raise UnreadableError.of(error, self._folder) from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its index, which is read once.

    Attributes:
        verified: every byte was checked against the index. False: only the sizes of the files were.
        passed_over: names of newer ones that are damaged, if it was looked for among others.
    """

    path: Path
    index: Index
    verified: bool = False
    passed_over: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """A checkpoint whose files are there and have the sizes in its index.

        Raises:
            CheckpointError: a file is missing or has another size, or the index is damaged.
        """
        index = Index.read(path)
        check_files(path, index.files, hashed=False)
        return cls(path, index)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def state(self) -> dict[str, Any]:
        """The trainer's own state."""
        return self.index.trainer

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(record.bytes for record in self.index.files.values())

    def weights(self, which: str = "model") -> LazyTensors:
        """Full weights by parameter name, float32 on the CPU, bitwise as the processes held them.

        Every file is checked first, unless that was done. A weight is then read on access. Needs no process group.
        Weights that the stage did not train are included. They have no EMA, so "ema" gives them as they are.

        Args:
            which: "model", the weights last trained, or "ema", their moving average.

        Raises:
            ValueError: `which` is neither.
            CheckpointError: the checkpoint is damaged, or holds no EMA.
        """
        if not self.verified:
            check_files(self.path, self.index.files)
        return self.unchecked_weights(which)

    def unchecked_weights(self, which: str) -> LazyTensors:
        """`weights` without a look at the files' checksums: for names and shapes."""
        kinds = {"model": MASTER, "ema": EMA}
        if which not in kinds:
            raise ValueError(f"weights must be model or ema, got {which!r}")
        if which == "ema" and self.index.ema_updates is None:
            raise CheckpointError(f"{self.path}: holds no EMA (it was trained with ema.enabled=false); use model")
        reader = SliceReader(self.path, self.index)

        def entry(group: str, slot: ParameterSlot) -> Entry:
            def read() -> Tensor:
                values = reader.read(group, kinds[which], slot.offset, slot.offset + slot.numel)
                if values.numel() != slot.numel:
                    raise CheckpointError(f"{self.path}: {slot.name}: {values.numel()} values instead of {slot.numel}")
                return slot.shaped(values).contiguous()

            return Entry(torch.Size(slot.shape), torch.float32, read)

        trained = {slot.name: entry(layout.group, slot) for layout in self.index.groups for slot in layout.slots}
        return LazyTensors(
            {**self.carried_over().entries, **LazyTensors(trained).checked(f"checkpoint={self.path}").entries}
        )

    def carried_over(self) -> LazyTensors:
        """What the stage did not train, by name."""
        if CARRIED_OVER_FILE not in self.index.files:
            return LazyTensors({})
        return open_tensors(self.path / CARRIED_OVER_FILE, "checkpoint")

    def weight_names(self) -> list[str]:
        """Names of all weights, trained or not."""
        trained = [slot.name for layout in self.index.groups for slot in layout.slots]
        return trained + list(self.carried_over())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a safetensors file and sync it to disk.

    The checksum is that of the written bytes; nothing is read back. Hashing and writing release Python's lock, so other
    threads keep running. The safetensors package holds the lock while it writes.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    # The format requires each tensor to be aligned to its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        dtype, shape = SAFETENSORS_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    # Hashing takes as long as writing to a fast disk, so they run in parallel.
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1, thread_name_prefix="checksum") as hashing:
        disk = _Disk(file)
        disk.write(memoryview(head))
        for _, tensor in ordered:
            content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            hashing.submit(digest.update, content)
            disk.write(content)
        os.fsync(file.fileno())
    moved()
    return FileRecord(len(head) + end, digest.hexdigest())


class _Disk:
    """Writes a file at the speed of its disk, not of memory, so that every block is a sign of progress."""

    def __init__(self, file: FileIO) -> None:
        self._file, self._waiting, self._most = file, 0, LEAST_SYNC_BYTES

    def write(self, content: memoryview) -> None:
        while content:
            written = self._file.write(content[:BLOCK_BYTES])
            content = content[written:]
            moved(written)
            self._waiting += written
            if self._waiting >= self._most:
                self._sync()

    def _sync(self) -> None:
        began = time.monotonic()
        os.fdatasync(self._file.fileno())
        slow = time.monotonic() - began > 1.0
        self._most = max(LEAST_SYNC_BYTES, self._most // 2) if slow else min(MOST_SYNC_BYTES, self._most * 2)
        self._waiting = 0
        moved()


def shard_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
