"""What gloo really raises, and what is said of it: a process has ended only where its number is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from vdtrain.run import distributed
from vdtrain.run.connections import connection_problem
from vdtrain.run.processes import machine, process_start

SOON = timedelta(seconds=2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pair() -> list[dist.ProcessGroupGloo]:
    """Two ends of gloo in this process."""
    store, made = dist.HashStore(), {}

    def join(rank: int) -> None:
        made[rank] = dist.ProcessGroupGloo(store, rank, 2, SOON)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [made[0], made[1]]


def raised(action: Callable[[], object]) -> BaseException:
    with pytest.raises(RuntimeError) as failure:
        action()
    return failure.value


def lost() -> BaseException:
    """The error of an end whose other end is gone."""
    ends = pair()
    work = ends[0].allreduce([torch.zeros(1 << 20)])
    del ends[1]
    return raised(work.wait)


def late() -> BaseException:
    ends = pair()
    return raised(ends[0].allreduce([torch.zeros(4)]).wait)


@pytest.fixture
def own() -> list[object]:
    return [machine(), os.getpid(), process_start(os.getpid())]


def test_a_process_that_has_ended_is_named(own: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    peer = [machine(), child.pid, process_start(child.pid)]
    assert child.stdin is not None
    child.stdin.close()
    # Not yet asked for its status, it keeps its number and has ended all the same.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    monkeypatch.setattr(distributed, "_peers", [own, peer])
    expected = "lost the connection to process 1, which has ended; see its log, then run the same command again"
    assert connection_problem(lost()) == expected
    child.wait()
    assert connection_problem(lost()) == expected


def test_where_all_run_or_nobody_knows_no_end_is_claimed(own: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    error = lost()
    monkeypatch.setattr("vdtrain.run.company.GRACE_SECONDS", 0.2)
    monkeypatch.setattr(distributed, "_peers", [own, [machine(), os.getppid(), process_start(os.getppid())]])
    assert "another process (all of them run)" in str(connection_problem(error))
    monkeypatch.setattr(distributed, "_peers", [own, [["node2", "", ""], *own[1:]]])
    said = str(connection_problem(error))
    assert "(it has ended, or the network between" in said
    assert "node2" in said
    # The same number in another container is another process.
    monkeypatch.setattr(distributed, "_peers", [own, [[*machine()[:2], "another"], 2**22 - 1, "7"]])
    assert "it has ended, or the network" in str(connection_problem(error))


def test_a_process_that_does_not_answer_has_not_ended() -> None:
    said = str(connection_problem(late()))
    assert said.startswith("another process did not answer within 2 s, though it has not ended; see in its log")


def test_a_start_that_fails_says_what_of_the_address_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_PORT", str(port))

    def meet(host: str, first: bool) -> BaseException:
        monkeypatch.setenv("MASTER_ADDR", host)
        return raised(lambda: dist.TCPStore(host, port, 2, first, SOON, wait_for_workers=True))

    said = str(connection_problem(meet("127.0.0.1", True)))
    assert said.startswith(f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: 1 of 2 processes came within")
    said = str(connection_problem(meet("127.0.0.1", False)))
    assert (
        said == f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: nothing answers there; start rank 0, or give its address"
    )
    said = str(connection_problem(meet("no-such-host.invalid", False)))
    assert said.startswith("MASTER_ADDR=no-such-host.invalid: no host of that name is known here")
    # The remedy: all are started, with this address.
    waiting = dist.TCPStore("127.0.0.1", port, 2, True, SOON, wait_for_workers=False)
    assert dist.TCPStore("127.0.0.1", port, 2, False, SOON).check([]) is True
    del waiting


def test_an_error_of_something_else_is_not_taken_for_one() -> None:
    for error in (RuntimeError("Connection reset by peer"), ConnectionResetError(104, "reset"), ValueError("gloo")):
        assert connection_problem(error) is None
    nccl = dist.DistBackendError(
        "NCCL error in: x.cpp:1, ncclInvalidUsage: bad usage.\nLast error:\nDuplicate GPU detected"
    )
    said = str(connection_problem(nccl))
    assert said == "NCCL failed (Duplicate GPU detected); run again with NCCL_DEBUG=INFO, which names the cause"
