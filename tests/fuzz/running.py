"""Runs a target on one input, and tells what is wrong with it."""

from __future__ import annotations

import faulthandler
import resource
import signal
import sys
import traceback
from types import FrameType

from tests.fuzz.targets import EXPECTED, Target, check

SECONDS, MEGABYTES = 10, 1_500


class TooSlowError(BaseException):
    """An input takes too long."""


def finding(target: Target, content: bytes) -> str | None:
    """What is wrong with the reading of an input: the traceback, or the time or memory; None if nothing is."""
    before = signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    # A loop in a library's own code ends the process, with its stacks.
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)
    peak = _peak()
    try:
        try:
            target.read(content)
        except EXPECTED as error:
            check(error)
    except TooSlowError:
        return f"takes more than {SECONDS} seconds"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "".join(traceback.format_exception(error))
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
    grown = _peak() - peak
    return f"takes {grown:,.0f} MB" if grown > MEGABYTES else None


def _late(number: int, frame: FrameType | None) -> None:
    raise TooSlowError


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
