"""Starting and ending the processes of a run, and the short words that they exchange outside of training.

A run is started by torchrun (RANK, WORLD_SIZE, ...), by Slurm's srun (SLURM_PROCID, ...) or plainly, as one process.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from vdtrain.engine.deepspeed import import_deepspeed
from vdtrain.run.launch import launch_variables
from vdtrain.run.lock import machine, process_start

TIMEOUT_SECONDS = 1800.0


# Machine, process number and its start of every process, by rank, as `vdtrain.run.lock` tells them.
_peers: list[list[Any]] = []
# Variables of the launcher as they were before `start`; None for those that were not set.
_replaced_variables: dict[str, str | None] = {}


class SharedError(RuntimeError):
    """An error that every process raises alike, whichever of them met it."""


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands among the processes of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def start(device: str, timeout_seconds: float = TIMEOUT_SECONDS, control_only: bool = False) -> RankInfo:
    """Join the processes of this run and choose this process's device.

    Args:
        device: "cuda" or "cpu".
        timeout_seconds: how long any exchange between processes may take before it is an error.
        control_only: the processes will exchange no tensors of GPUs, and have no engine.

    Raises:
        ValueError: if the launcher's variables are incomplete, or no GPU stands ready for this process.
    """
    launch = launch_variables()
    rank, local_rank, world_size = int(launch["RANK"]), int(launch["LOCAL_RANK"]), int(launch["WORLD_SIZE"])
    place = RankInfo(rank, local_rank, world_size, local_device(device, local_rank))
    # DeepSpeed takes the device of a process from LOCAL_RANK.
    launch["LOCAL_RANK"] = str(place.device.index if place.device.index is not None else local_rank)
    _replaced_variables.update({name: os.environ.get(name) for name in launch})
    os.environ.update(launch)
    # Before there is a group: some modules of PyTorch that it imports take the world group of that moment as a default,
    # and would keep it alive beyond `finish`.
    if not control_only:
        import_deepspeed(place.device.type)
    timeout = timedelta(seconds=timeout_seconds)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    # Words between processes travel through the CPU, whatever the gradients do.
    nccl = place.device.type == "cuda" and not control_only
    backend, device_id = ("cpu:gloo,cuda:nccl", place.device) if nccl else ("gloo", None)
    _keep_gloo_on_loopback(launch.get("MASTER_ADDR", "127.0.0.1"))
    if world_size == 1:
        # Neither a port nor a name server is needed to speak to oneself.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, init_method="env://", timeout=timeout, device_id=device_id)
    _peers[:] = gather_json([machine(), os.getpid(), process_start(os.getpid())])
    return place


def finish() -> None:
    """Leave the process group; every process must come here, engines closed, or end by an error.

    A gloo thread that outlives the interpreter's objects aborts the process now and then, so that every reference to
    the groups must go first, those that DeepSpeed keeps among them.
    """
    if dist.is_initialized():
        deepspeed: Any = sys.modules.get("deepspeed.comm")
        started = deepspeed is not None and deepspeed.is_initialized()
        (deepspeed if started else dist).destroy_process_group()
        gc.collect()
    # A process that trains again, or something else, is not to take itself for one of several.
    for name, value in _replaced_variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _replaced_variables.clear()


def rank() -> int:
    """This process's number; 0 where no group was started."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 where no group was started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def peers() -> list[list[Any]]:
    """Machine, of which the host comes first, process number and its start of every process, by rank."""
    return _peers


def barrier() -> None:
    """Return when every process has come here."""
    all_agree(True)


def all_agree(flag: bool) -> bool:
    """True on every process if `flag` is true on every process, else False on every process."""
    if world_size() == 1:
        return flag
    votes = torch.tensor([int(flag)], dtype=torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes.item())


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every process's `value`, by rank, on every process. The values must be JSON: nothing is ever unpickled.

    Args:
        group: all processes, as another group than the one that training uses, for a thread beside it.
    """
    if world_size() == 1:
        return [value]
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([payload.numel()]), group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: payload.numel()] = payload
    rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world_size())]
    dist.all_gather(rows, padded, group)
    return [json.loads(bytes(row[: int(length)].tolist())) for row, length in zip(rows, lengths, strict=True)]


def raise_if_any(failure: str | None) -> None:
    """Raise a SharedError with the first process's `failure` on every process, unless it is None on all of them."""
    failures = [found for found in gather_json(failure) if found is not None]
    if failures:
        raise SharedError(failures[0])


def broadcast_json(value: Any, source: int = 0) -> Any:
    """The `value` of rank `source`, on every process."""
    return gather_json(value if rank() == source else None)[source]


def local_device(kind: str, local_rank: int) -> torch.device:
    """The device of a process, "cuda" or "cpu", by its number among those of its node.

    Raises:
        ValueError: no GPU stands ready for it.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ValueError(f"hardware.device: {kind!r} is neither cuda nor cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError("hardware.device: cuda, but PyTorch finds no GPU; choose hardware=cpu or repair the driver")
    # Under --gpus-per-task=1 each process sees one GPU only, and calls it 0.
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise ValueError(f"hardware.device: process {local_rank} of its node, {count} GPUs; start one process per GPU")
    return torch.device("cuda", index)


def _keep_gloo_on_loopback(address: str) -> None:
    """Let gloo skip the look-up of the host's own name, which fails on machines without a name server."""
    if address in ("127.0.0.1", "localhost") and any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
