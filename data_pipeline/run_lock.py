"""One run at a time over what runs of the same command would write."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vdtrain.config.compose import ConfigError
from vdtrain.errors import unlockable

# How long a run waits for the processes of one that was killed to be gone.
LOCK_SECONDS = 10.0


class RunLockError(RuntimeError):
    """Another run holds the lock."""


@contextmanager
def run_lock(path: Path) -> Iterator[Path]:
    """Keep another run out, whose processes can live a moment longer than itself.

    Args:
        path: of the file to lock; it stays.

    Returns:
        The file that processes hold locked with this one, for `workers`.

    Raises:
        ConfigError: the file cannot be locked there.
        RunLockError: another run is at work, still after LOCK_SECONDS.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RunLockError(f"{path} is held by another run") from error
                time.sleep(0.1)
            except OSError as error:
                raise ConfigError(f"{path}: {unlockable(error, path)}") from error
        # Shared with the processes from here on.
        fcntl.flock(file, fcntl.LOCK_SH)
        yield path
