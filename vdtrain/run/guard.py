"""Ends a process that hangs while it holds Python's lock, which its own watchdog needs: `python -IS guard.py PID`.

Standard input receives a line with a number of seconds at every turn of the watchdog, and ends with the process. The
seconds count only while the process runs: one that was stopped by SIGSTOP or Ctrl-Z has not hung.
"""

import contextlib
import os
import select
import signal
import sys
import time

# The signal by which faulthandler writes the stacks, without Python's lock.
DUMP = signal.SIGRTMIN + 7
TURN_SECONDS = 0.5
DUMP_SECONDS = 2.0


def stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


def main(pid: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    limit = left = float("inf")
    while left > 0:
        if select.select([0], [], [], TURN_SECONDS)[0]:
            content = os.read(0, 1 << 16)
            if not content:
                return
            limit = left = float(content.split()[-1])
        elif not stopped(pid):
            left -= TURN_SECONDS
    line = f"error: process {pid} stood still for {limit:.0f} s and holds Python's lock; its stacks:\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
        os.kill(pid, DUMP)
        time.sleep(DUMP_SECONDS)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
