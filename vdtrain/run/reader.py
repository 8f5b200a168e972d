"""The reader of an output may go away, as `head` does: the command then ends without a word. Imports little."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from vdtrain.errors import unwritable

# As a shell gives it for a program that the signal ends. The signal itself would end training too, for any connection.
GONE_STATUS = 128 + signal.SIGPIPE
OUTPUTS = (1, 2)
# No room for what is printed into a file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def quietly(action: Callable[[], int]) -> int:
    """The exit status of a command: that of `action`, or GONE_STATUS if nobody reads its output any more."""
    try:
        status = _status(action)
        # Python itself would fail at its very end.
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # It may be another pipe than that to the reader.
        if not (gone := [each for each in OUTPUTS if _is_gone(each)]):
            raise
        status = GONE_STATUS
        _discard(*gone)
    except OSError as error:
        # Of a file, the command itself has told.
        if error.errno not in FULL or error.filename is not None:
            raise
        _discard(1)
        print(f"error: standard output: {unwritable(error, Path('/dev/stdout'), '')}", file=sys.stderr)
        status = 1
    return status


def _status(action: Callable[[], int]) -> int:
    try:
        return action()
    except SystemExit as end:
        # So does argparse end a command.
        if not isinstance(end.code, int):
            raise
        return end.code


def _is_gone(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _discard(*descriptors: int) -> None:
    """Let what is still printed to them go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for each in descriptors:
        os.dup2(nowhere, each)
    os.close(nowhere)
