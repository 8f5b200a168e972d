"""The processes of a run while they come together: who is there, and whether one was lost before the groups formed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from vdtrain.run.processes import machine, process_start, started_by_command
from vdtrain.run.pulse import moved

if TYPE_CHECKING:
    from vdtrain.run.watchdog import Watchdog

# How long a process waits for the others, and then for their group.
JOIN_SECONDS = 300.0
LOOK_SECONDS = 0.5
BEAT_SECONDS = 1.0
# How long the store of a run may take to answer.
ANSWER_SECONDS = 5.0
# A process closes its connections a moment before it is gone. One that meets the loss itself says more.
GRACE_SECONDS = 3.0
# Exit status of a process that has lost another one.
LOST_STATUS = 1


# What a process that will not come says to those that wait for it.
MISTAKE = "vdtrain/mistake"
FIRST_TURN_SECONDS = 0.02


class JoinError(RuntimeError):
    """Other processes did not come; the message is one line."""


class Company:
    """All processes of a run, which have come and have no group yet. Every process must make it.

    Args:
        seconds: how long it waits for the others.

    Attributes:
        store: what the processes exchange by keys, with `seconds` as its time limit.
        peers: machine, process number and process start of every process, by rank.

    Raises:
        JoinError: another process did not come.
    """

    def __init__(self, rank: int, world_size: int, seconds: float) -> None:
        self.rank, self._left = rank, False
        self.store = _store(rank, world_size, timedelta(seconds=seconds))
        keys = [f"vdtrain/come/{each}" for each in range(world_size)]
        self.store.set(keys[rank], json.dumps(this_process()))
        end, turn = time.monotonic() + seconds, FIRST_TURN_SECONDS
        while not self.store.check(keys):
            if self.store.check([MISTAKE]):
                raise JoinError(self.store.get(MISTAKE).decode(errors="replace"))
            if time.monotonic() >= end:
                absent = [each for each, key in enumerate(keys) if not self.store.check([key])]
                raise JoinError(
                    f"{named(absent)} did not come within {seconds:g} s; see why in the log there, then start all of "
                    "them again"
                )
            # To the watchdog this is work: the wait has a limit of its own, and then names who is absent.
            moved()
            time.sleep(turn)
            turn = min(2 * turn, LOOK_SECONDS)
        # Of the watchdog's thread.
        self._teller = self.store.clone()
        self.peers: list[list[Any]] = [json.loads(self.store.get(key)) for key in keys]

    def tell(self, still: float, heartbeats: int, place: str) -> None:
        """Tell the others how this process fares: seconds without a heartbeat, heartbeats so far, and its place."""
        if not self._left:
            with contextlib.suppress(RuntimeError):
                self._teller.set(f"vdtrain/at/{self.rank}", json.dumps([time.time(), still, heartbeats, place]))

    def late(self, still: float, silence: float) -> str:
        """The end of a sentence on which process is late; empty if it is this one, or unknown.

        Args:
            silence: a process that has told nothing for longer, and for ANSWER_SECONDS more, does not run.
        """
        answer: list[str] = []
        # The process that holds the store may be the one that hangs.
        asking = threading.Thread(target=lambda: answer.append(self._late(still, silence)), daemon=True)
        asking.start()
        asking.join(ANSWER_SECONDS)
        return answer[0] if answer else "; the other processes cannot be asked"

    def _late(self, still: float, silence: float) -> str:
        try:
            told = self._told(self.store.clone())
        except RuntimeError:
            return ""
        others = [rank for rank in range(len(told)) if rank != self.rank]
        silent = [rank for rank in others if time.time() - told[rank][0] > silence + ANSWER_SECONDS]
        if silent:
            return f"; {named(silent)} did not run"
        latest = max(others, key=lambda rank: float(told[rank][1]))
        _, its, _, place = told[latest]
        return f"; process {latest} stood still for longer, at: {place}" if its > still else ""

    def _told(self, store: Store) -> list[list[Any]]:
        return [json.loads(text) for text in store.multi_get([f"vdtrain/at/{rank}" for rank in range(len(self.peers))])]

    @contextlib.contextmanager
    def following(self, watchdog: Watchdog) -> Iterator[None]:
        """While the block waits for all others, their heartbeats are its own; a process without one is named.

        So the watchdog ends the wait for a process that stands still, even if that one cannot end itself.
        """
        self.store.set(f"vdtrain/done/{self.rank}", "")
        with _beside(lambda over: self._follow(over, watchdog)):
            yield

    def _follow(self, over: threading.Event, watchdog: Watchdog) -> None:
        store, before = self.store.clone(), dict.fromkeys(range(len(self.peers)), -1)
        fresh: set[int] = set()
        with contextlib.suppress(RuntimeError):
            while not over.wait(BEAT_SECONDS):
                working = {rank for rank in before if not store.check([f"vdtrain/done/{rank}"])}
                now = {rank: int(told[2]) for rank, told in enumerate(self._told(store))}
                fresh |= {rank for rank in working if now[rank] != before[rank]}
                before = now
                if working and fresh >= working:
                    watchdog.heartbeat(f"waiting for {named(sorted(working))}")
                    fresh = set()
                elif working:
                    watchdog.place = f"waiting for {named(sorted(working - fresh))}"

    def leave(self) -> None:
        """Tell the others that this process ends in order, with a message of its own if there is one."""
        self._left = True
        with contextlib.suppress(RuntimeError):
            self.store.set(f"vdtrain/left/{self.rank}", "")

    @contextlib.contextmanager
    def kept(self, seconds: float | None = None) -> Iterator[None]:
        """While the block runs, the loss of another process ends this one, in one line and with status 1.

        The libraries that form groups wait for a lost process until their own time limit.

        Args:
            seconds: the longest time for the block. It bounds the wait for a process of another machine.
        """
        with _beside(lambda over: self._watch(over, seconds)):
            yield

    def _watch(self, over: threading.Event, seconds: float | None) -> None:
        began, here, line = time.monotonic(), on_this_machine(self.peers), ""
        gone: list[int] = []
        # The main thread may wait by way of the other one.
        store = self.store.clone()
        while not line and not over.wait(LOOK_SECONDS):
            gone = [rank for rank in here if is_gone(self.peers[rank])]
            if gone and not _have_left(store, gone):
                line = f"lost {named(gone)} while the groups formed; see its log, then run the same command again"
            elif seconds is not None and time.monotonic() - began > seconds:
                line = f"no group of all processes formed within {seconds:g} s; see their logs and the network there"
        if line and not over.wait(GRACE_SECONDS):
            # A command that started the processes says itself which of them was lost.
            if not (gone and started_by_command()):
                print(f"error: process {self.rank}: {line}", file=sys.stderr, flush=True)
            os._exit(LOST_STATUS)


@contextlib.contextmanager
def _beside(watch: Callable[[threading.Event], None]) -> Iterator[None]:
    """Watch on another thread while the block runs; the event says that it is over."""
    over = threading.Event()
    thread = threading.Thread(target=watch, args=(over,), name="company", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(ANSWER_SECONDS)


def _store(rank: int, world_size: int, limit: timedelta) -> Store:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store: Store = next(rendezvous("env://", rank, world_size, timeout=limit))[0]
        return store
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # PyTorch's own wait for the others would not name them.
    return TCPStore(host, port, world_size, rank == 0, limit, wait_for_workers=False, multi_tenant=True)


def tell_mistake(rank: int, world_size: int, text: str, seconds: float) -> None:
    """Tell the processes that wait for this one that it will not come. Their store must be there."""
    with contextlib.suppress(RuntimeError):
        _store(rank, world_size, timedelta(seconds=seconds)).set(MISTAKE, f"process {rank} will not come: {text}")


def this_process() -> list[Any]:
    """Machine, process number and process start of this process; see `vdtrain.run.processes`."""
    return [machine(), os.getpid(), process_start(os.getpid())]


def on_this_machine(peers: Sequence[Sequence[Any]]) -> list[int]:
    """The ranks whose process numbers mean something here."""
    own = machine()
    return [rank for rank, (where, *_) in enumerate(peers) if where == own]


def is_gone(peer: Sequence[Any]) -> bool:
    """Whether a process of this machine has ended."""
    _, pid, started = peer
    return bool(process_start(pid) != started)


def named(ranks: Sequence[int], most: int = 4) -> str:
    """Some processes in words: "process 3", or "processes 1, 2, 3, 4 and 5 more"."""
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"process{'es' * (len(ranks) != 1)} {', '.join(map(str, ranks[:most]))}{more}"


def _have_left(store: Store, ranks: Sequence[int]) -> bool:
    try:
        return any(store.check([f"vdtrain/left/{rank}"]) for rank in ranks)
    except RuntimeError:
        return False
