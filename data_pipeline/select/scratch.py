"""What a select writes while it runs, below `data.select.scratch`. Nothing of it is used by a later select."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vdtrain.errors import ConfigError
from vdtrain.files import LockedError, locked

FOLDER = "vdtrain_select"
# The last column of `Scratch.rows`, which the parts do not have.
ADDRESS = "address"
# How long a select waits for the worker processes of one that was killed.
LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Scratch:
    """The names of the scratch files. `given` is the setting's value."""

    given: str

    @property
    def setting(self) -> str:
        """The setting and its value, for errors."""
        return f"data.select.scratch={self.given}"

    @property
    def lock(self) -> Path:
        return Path(f"{Path(self.given)}.lock")

    @property
    def folder(self) -> Path:
        """A folder below the given one, which can hold files of others."""
        return Path(self.given) / FOLDER

    @property
    def block_lists(self) -> Path:
        return self.folder / "block_lists"

    @property
    def kept(self) -> Path:
        """The numbers of the rows that the parts will hold: int64, ascending, without a header."""
        return self.folder / "kept.int64"

    def rows(self, file: int) -> Path:
        """The rows of a metadata file that pass the filters, with their addresses where the URL is another text."""
        return self.folder / f"rows-{file:06d}.parquet"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the scratch folder for the block, and remove what is in it before and afterwards.

        Raises:
            ConfigError: another select is at work.
        """
        try:
            with locked(self.lock, LOCK_SECONDS):
                self._remove()
                try:
                    yield
                finally:
                    self._remove()
        except LockedError as error:
            raise ConfigError(
                f"{self.setting}: another select is writing there (process {error.holder}); wait for it or stop it"
            ) from error

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            Path(self.given).rmdir()
