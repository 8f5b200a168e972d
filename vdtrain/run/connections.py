"""What an error of the exchange between processes means: a process that is gone, one that is late, or a bad address."""

from __future__ import annotations

import os
import re
import socket
import time

import torch.distributed as dist

from vdtrain.errors import one_line
from vdtrain.run import distributed
from vdtrain.run.company import GRACE_SECONDS, JoinError, is_gone, named, on_this_machine
from vdtrain.run.processes import started_by_command

# How gloo and NCCL report a lost connection.
LOST = re.compile(r"closed by (?:remote )?peer|connection reset|broken pipe|remote process exited", re.IGNORECASE)
LATE = re.compile(r"timed out waiting (\d+)ms for \w+ operation", re.IGNORECASE)
ABSENT = re.compile(r"timed out after (\d+) seconds waiting for clients\. (\d+)/(\d+) clients joined", re.IGNORECASE)
UNREACHED = re.compile(r"client socket has (?:timed out|failed)", re.IGNORECASE)
TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
NAMED = 4


def connection_problem(error: BaseException) -> str | None:
    """A line with the remedy for an error of PyTorch's collectives or their start; None for any other error.

    It claims that another process has ended only if its number is gone from this machine. It is empty if the command
    that started the processes, or another of them, says it.
    """
    if not isinstance(error, RuntimeError):
        return None
    text = one_line(error)
    if isinstance(error, JoinError):
        return text
    ours = isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text
    if not ours:
        return None
    if LOST.search(text):
        return _lost()
    if late := LATE.search(text):
        return (
            f"another process did not answer within {int(late[1]) / 1000:g} s, though it has not ended; see in its log "
            "where it stands still, then run the same command again"
        )
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if absent := ABSENT.search(text):
        return (
            f"MASTER_ADDR={address}, MASTER_PORT={port}: {absent[2]} of {absent[3]} processes came within {absent[1]} "
            "s; start all of them with this address"
        )
    if TAKEN.search(text):
        return f"MASTER_PORT={port}: another program listens there; give another one, with `--master-port` for torchrun"
    if UNREACHED.search(text):
        return _unreached(address, port)
    if isinstance(error, dist.DistBackendError):
        reason = text.partition("Last error: ")[2] or text
        return f"NCCL failed ({reason}); run again with NCCL_DEBUG=INFO, which names the cause"
    return None


def _lost() -> str:
    then = "see its log, then run the same command again"
    peers = distributed.peers()
    here = on_this_machine(peers)
    deadline = time.monotonic() + GRACE_SECONDS
    while not (ended := [rank for rank in here if is_gone(peers[rank])]):
        if not here or time.monotonic() > deadline:
            if started_by_command() and os.environ["LOCAL_RANK"] != "0":
                return ""
            return f"lost the connection to another process ({_unproven(len(here))}); {then}"
        time.sleep(0.1)
    if started_by_command():
        return ""
    return f"lost the connection to {named(ended)}, which {'has' if len(ended) == 1 else 'have'} ended; {then}"


def _unproven(processes_here: int) -> str:
    peers = distributed.peers()
    if processes_here >= len(peers):
        return "all of them run"
    hosts = sorted({str(machine[0]) for machine, *_ in peers})
    return f"it has ended, or the network between {', '.join(hosts[:NAMED])} failed"


def _unreached(address: str, port: str) -> str:
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        return f"MASTER_ADDR={address}: no host of that name is known here; give the name or address of rank 0's host"
    return f"MASTER_ADDR={address}, MASTER_PORT={port}: nothing answers there; start rank 0, or give its address"
