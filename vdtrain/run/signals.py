"""How a command ends: by a signal, with its launcher, or when nobody reads its output. Imports little.

`begin` makes Ctrl-C (SIGINT) and SIGTERM end a command from its first import on, with one line and status 130 or 143.
In training a `StopSignal` records them instead, and all ranks act on them at the same step boundary.
`quietly` ends a command without a word if the reader of its output has gone, as `head` does.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from vdtrain.errors import unwritable
from vdtrain.redaction import redact_output
from vdtrain.run.processes import launchers

# Schedulers stop a run with these.
SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A command that starts its ranks itself blocks these in them until they have their handlers.
HELD = (signal.SIGINT, *SCHEDULER_SIGNALS)
STATUSES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# How long an interrupted command may take to remove its drafts and end its workers.
GRACE_SECONDS = 5.0
# An import is not interrupted: so often it is seen whether it is over, and so long it may take.
IMPORT_TURN_SECONDS, IMPORT_SECONDS = 0.05, 30.0
SHOW_CURSOR = "\x1b[?25h"
# As a shell gives it for a program that the signal ends. The signal itself would end training too, for any connection.
GONE_STATUS = 128 + signal.SIGPIPE
OUTPUTS = (1, 2)
# No room for what is printed into a file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Ending:
    """How this process ends by a signal.

    Attributes:
        number: of the signal that interrupted the command; 0 before.
        at_once: statuses by signals that need no time to clean up.
        advice: what the line tells the user to do.
        cause: what the line says instead of the signal's name.
        saves: whether a stopped run saves.
        received: the newest signal with a handler; 0 before.
        passes_on: what this process does with its signals if it does not act on them itself.
        told: the status of an error that the command has printed; None before. No line follows it.
    """

    def __init__(self) -> None:
        self.number = 0
        self.at_once: dict[int, int] = {}
        self.advice = ""
        self.cause = ""
        self.saves = False
        self.received = 0
        self.passes_on: Callable[[int], None] | None = None
        self.told: int | None = None
        self._leaving = threading.Lock()
        self._deferred = 0

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler: end the command by an exception, so that drafts are removed and workers ended.

        An import is not interrupted: an exception in the libraries' C++ would abort the process.
        """
        self._deferred = 0 if self.number or not _imports(frame) else number
        if not self.number and not self._deferred:
            self.number = number
            # The exception may arise in a destructor, or end another thread by way of this one.
            sys.unraisablehook = lambda *_: None
            threading.excepthook = lambda *_: None
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if the command is interrupted: the error at hand may be a consequence."""
        if self.number:
            raise KeyboardInterrupt

    def leave(self, number: int, frame: FrameType | None = None, status: int | None = None) -> NoReturn:
        """Say that the command was stopped, and end this process without any further step."""
        self._leaving.acquire()
        if self.told is not None:
            # A launcher ends the others as soon as one has failed.
            os._exit(self.told)
        line = f"stopped: {self.cause}" if self.cause else f"stopped by {_name(number)}"
        line += f"; {self.advice}" if self.advice else ""
        if _is_first(on_node=bool(self.cause)):
            _say(line)
        os._exit(STATUSES.get(signal.Signals(number), 128 + number) if status is None else status)

    def watch(self, reader: int, launching: Mapping[int, str]) -> NoReturn:
        """Act on signals while the main thread cannot, on its own thread.

        Args:
            reader: a pipe that receives the number of every signal with a handler.
        """
        interruptions, repeated, deadline, latest, waited = 0, 0, float("inf"), 0.0, [reader, *launching]
        while True:
            left = None if deadline == float("inf") else max(0.0, min(IMPORT_TURN_SECONDS, deadline - time.monotonic()))
            ready = select.select(waited, [], [], left)[0]
            if not ready and time.monotonic() >= deadline:
                self.leave(self.number or self._deferred or signal.SIGTERM)
            if not ready and self._deferred:
                repeated += 1
                deadline = min(latest, time.monotonic() + GRACE_SECONDS)
                os.kill(os.getpid(), self._deferred)
            for descriptor in ready:
                if descriptor != reader:
                    waited.remove(descriptor)
                    self._end_with(launching[descriptor])
                    continue
                number = os.read(reader, 1)[0]
                self.received = number
                if self.passes_on is not None:
                    self.passes_on(number)
                    continue
                if repeated:
                    repeated -= 1
                    continue
                interruptions += number == signal.SIGINT
                if number in self.at_once:
                    self.leave(number, status=self.at_once[number])
                if number == signal.SIGINT and interruptions > 1:
                    self.leave(number)
                if signal.getsignal(number) == self.interrupt:
                    latest = latest or time.monotonic() + IMPORT_SECONDS
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)

    def _end_with(self, launcher: str) -> None:
        self.cause = f"{launcher} launched this process and has ended"
        if self.saves and _is_first(on_node=True):
            _say(f"warning: {self.cause}; the run stops at the next step and saves")
        if self.saves or signal.getsignal(signal.SIGTERM) == self.interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.leave(signal.SIGTERM)


ending = _Ending()


def begin() -> None:
    """Let Ctrl-C, SIGTERM and the end of the launcher end this command. Called once, before the slow imports.

    From then on the command prints no credentials, not even in a traceback.

    An exception ends the main thread, which has GRACE_SECONDS to clean up. A second Ctrl-C ends the process at once,
    even if the main thread waits in a library that handles no signals.
    """
    redact_output()
    ending.told = None
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in STATUSES:
        # A background job of a script ignores Ctrl-C.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, ending.interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STATUSES)
    sys.excepthook = _hook
    threading.Thread(target=ending.watch, args=(reader, launchers()), name="signals", daemon=True).start()


def ended(status: int) -> int:
    """The status of a command whose work is over. A signal ends the process at once from now on."""
    if ending.number:
        _leave()
    ending.told = status or None
    for number in STATUSES:
        if signal.getsignal(number) == ending.interrupt:
            signal.signal(number, ending.leave)
    return status


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported at this point of the main thread."""
    while frame and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if ending.number:
        _leave()
    sys.__excepthook__(kind, error, trace)


def _leave() -> NoReturn:
    with suppress(OSError, ValueError):
        # A signal may come between a line and its end.
        if getattr(sys.stderr, "unfinished", False):
            print(file=sys.stderr, flush=True)
        sys.stdout.flush()
    ending.leave(ending.number)


def _say(line: str) -> None:
    # Not by sys.stderr, whose lock the main thread may hold.
    with suppress(OSError):
        os.write(2, f"{SHOW_CURSOR if os.isatty(2) else ''}{line}\n".encode())


def _is_first(on_node: bool) -> bool:
    """Whether this process speaks for all ranks, or for those of its node."""
    names = ("LOCAL_RANK", "SLURM_LOCALID") if on_node else ("RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopSignal:
    """Records the first stop signal. A second SIGINT ends the process at once, as users expect of Ctrl-C."""

    def __init__(self, numbers: Sequence[signal.Signals] = (signal.SIGINT, *SCHEDULER_SIGNALS)) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}
        self._note_all(numbers)

    def save_first(self) -> None:
        """Record Ctrl-C and the end of the launcher too, from now on: there is something to save."""
        self._note_all([signal.SIGINT])
        ending.saves = True

    def _note_all(self, numbers: Sequence[signal.Signals]) -> None:
        for number in numbers:
            self._previous.setdefault(number, signal.signal(number, self._note))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if number == signal.SIGINT:
            previous = self._previous[number]
            signal.signal(number, previous if callable(previous) else signal.default_int_handler)

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C."""
        return self.number == signal.SIGINT

    def ignore(self) -> None:
        """Ignore further SIGTERMs and SIGUSR1s: this process is about to end with its proper status.

        Slurm's `srun --kill-on-bad-exit` sends SIGTERM to processes that end a moment after the first.
        """
        for number in SCHEDULER_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        ending.saves = False


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
