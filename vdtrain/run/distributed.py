"""Starting and ending the process group, and the small exchanges between processes outside training.

torchrun (RANK, WORLD_SIZE, ...) or srun (SLURM_PROCID, ...) starts a run; without them it is a single process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from vdtrain.checkpoint.folder import CheckpointError, UnreadableError
from vdtrain.engine.deepspeed import import_deepspeed
from vdtrain.errors import ConfigError, described, one_line
from vdtrain.run.company import JOIN_SECONDS, Company, this_process
from vdtrain.run.ranks import launch_variables
from vdtrain.run.watchdog import Watchdog

TIMEOUT_SECONDS = 1800.0


# Machine, process number and start of every process, by rank; see `vdtrain.run.processes`.
_peers: list[list[Any]] = []
_company: Company | None = None
# Whether the processes of this run have come together, once.
_has_joined = False
# Time limit of every collective; None until `start`.
_timeout: timedelta | None = None
# For messages beside training. They may have to wait for a process that reads a checkpoint; the watchdogs know whether
# it works. None outside training.
_control: Any = None
CONTROL_TIMEOUT = timedelta(days=1)
# The launcher's variables before `start`; None for unset ones.
_replaced_variables: dict[str, str | None] = {}


class SharedError(RuntimeError):
    """An error that every process raises, whichever of them met it."""


# Errors that `on_first` passes on, the narrower ones first.
KINDS = (ConfigError, UnreadableError, CheckpointError, SharedError)


@dataclass(frozen=True)
class RankInfo:
    """This process's rank, local rank and device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def start(device: str, timeout_seconds: float = TIMEOUT_SECONDS, control_only: bool = False) -> RankInfo:
    """Join the processes of this run and choose this process's device.

    Args:
        timeout_seconds: time limit of every collective.
        control_only: gloo group only, no NCCL and no engine.

    Raises:
        ConfigError: the launcher's variables are incomplete, or this process has no GPU.
        JoinError: another process did not come.
    """
    global _company, _control, _timeout, _has_joined
    launch = launch_variables()
    rank, local_rank, world_size = int(launch["RANK"]), int(launch["LOCAL_RANK"]), int(launch["WORLD_SIZE"])
    place = RankInfo(rank, local_rank, world_size, local_device(device, local_rank))
    # DeepSpeed chooses the device by LOCAL_RANK.
    launch["LOCAL_RANK"] = str(place.device.index if place.device.index is not None else local_rank)
    _replaced_variables.update({name: os.environ.get(name) for name in launch})
    os.environ.update(launch)
    # Before the group exists: some PyTorch modules that it imports would keep the world group alive after `finish`.
    if not control_only:
        import_deepspeed(place.device.type)
    timeout = timedelta(seconds=timeout_seconds)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    # Control messages always use gloo.
    nccl = place.device.type == "cuda" and not control_only
    backend, device_id = ("cpu:gloo,cuda:nccl", place.device) if nccl else ("gloo", None)
    _keep_gloo_on_loopback(launch.get("MASTER_ADDR", "127.0.0.1"))
    if world_size == 1:
        # A single process needs neither a port nor a name server.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        _peers[:] = [this_process()]
    else:
        seconds = min(JOIN_SECONDS, timeout_seconds)
        _company = Company(rank, world_size, seconds)
        _has_joined = True
        _peers[:] = _company.peers
        with company(seconds):
            dist.init_process_group(
                backend, store=_company.store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
            )
        if not control_only:
            _control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    _timeout = timeout
    return place


def company(seconds: float | None = None) -> contextlib.AbstractContextManager[None]:
    """Watch for lost processes; see `Company.kept`."""
    return contextlib.nullcontext() if _company is None else _company.kept(seconds)


def has_joined() -> bool:
    """Whether the processes of this run have come together, now or before."""
    return _has_joined


def watch(watchdog: Watchdog) -> None:
    """Let the watchdogs of the processes know of each other. Every process must call it."""
    if _company is not None:
        watchdog.join(_company)


def following(watchdog: Watchdog) -> contextlib.AbstractContextManager[None]:
    """Wait for the others; see `Company.following`. Their watchdogs must know of each other."""
    return contextlib.nullcontext() if _company is None else _company.following(watchdog)


def finish() -> None:
    """Leave the process group. Every process must call it with its engines closed, or end by an error.

    A gloo thread that outlives the interpreter's objects sometimes aborts the process. So all references to the groups
    must go first, including DeepSpeed's.
    """
    global _company, _control
    _control = None
    if _company is not None:
        _company.leave()
        _company = None
    if dist.is_initialized():
        deepspeed: Any = sys.modules.get("deepspeed.comm")
        started = deepspeed is not None and deepspeed.is_initialized()
        (deepspeed if started else dist).destroy_process_group()
        gc.collect()
    # A later run in this process must not take itself for one of several.
    for name, value in _replaced_variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _replaced_variables.clear()


def new_group() -> Any:
    """Another group of all processes, with the run's time limit. Every process must call it."""
    return dist.new_group(timeout=_timeout)


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def peers() -> list[list[Any]]:
    """Machine (host first), process number and process start of every process, by rank."""
    return _peers


def barrier() -> None:
    """Return when every process has called it."""
    all_agree(True)


def all_agree(flag: bool) -> bool:
    """True on every process if `flag` is true on every process, else False on every process."""
    if world_size() == 1:
        return flag
    votes = torch.tensor([int(flag)], dtype=torch.int32)
    dist.all_reduce(votes, dist.ReduceOp.MIN, _control)
    return bool(votes.item())


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """All-gather one JSON value per process, by rank. Nothing is unpickled.

    Args:
        group: another group of all processes, for use beside training.
    """
    if world_size() == 1:
        return [value]
    group = group or _control
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([payload.numel()]), group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: payload.numel()] = payload
    rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world_size())]
    dist.all_gather(rows, padded, group)
    return [json.loads(bytes(row[: int(length)].tolist())) for row, length in zip(rows, lengths, strict=True)]


def joined(rows: Tensor) -> Tensor:
    """The sum of a tensor on the CPU over all processes, each of which has filled rows of its own among zeros."""
    if world_size() > 1:
        dist.all_reduce(rows, group=_control)
    return rows


def first_failure(failure: str | None) -> str | None:
    """The first `failure` of all processes, on every process; None if it is None on all."""
    return next((found for found in gather_json(failure) if found is not None), None)


def raise_if_any(failure: str | None) -> None:
    """Raise a SharedError with the first `failure` on every process, unless it is None on all."""
    if (found := first_failure(failure)) is not None:
        raise SharedError(found)


def on_first(action: Callable[[], Any]) -> Any:
    """The JSON value of `action` on rank 0, on every process; so all processes decide by one look at the files.

    Raises:
        ConfigError, UnreadableError, CheckpointError, SharedError: on every process, what it raised; for an OSError, a
            SharedError.
    """
    value, failure = None, None
    if rank() == 0:
        try:
            value = action()
        except (*KINDS, OSError) as error:
            kind = next((number for number, each in enumerate(KINDS) if isinstance(error, each)), -1)
            failure = [kind, described(error) if isinstance(error, OSError) else one_line(error)]
    value, failure = broadcast_json([value, failure])
    if failure is not None:
        raise KINDS[failure[0]](failure[1])
    return value


def broadcast_json(value: Any, source: int = 0) -> Any:
    """The `value` of rank `source`, on every process."""
    return gather_json(value if rank() == source else None)[source]


def local_device(kind: str, local_rank: int) -> torch.device:
    """The device of a process ("cuda" or "cpu") by its local rank.

    Raises:
        ConfigError: there is no GPU for it.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ConfigError(f"hardware.device: {kind!r} is neither cuda nor cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("hardware.device: cuda, but PyTorch finds no GPU; choose hardware=cpu or repair the driver")
    # With --gpus-per-task=1 each process sees only its own GPU, as number 0.
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise ConfigError(f"hardware.device: process {local_rank} of its node, {count} GPUs; start one process per GPU")
    return torch.device("cuda", index)


def _keep_gloo_on_loopback(address: str) -> None:
    """Keep gloo from resolving the host's own name, which fails without a name server."""
    if address in ("127.0.0.1", "localhost") and any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
