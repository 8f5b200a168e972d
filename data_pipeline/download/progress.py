"""How a download stands."""

from __future__ import annotations

from data_pipeline.failures import Tally
from data_pipeline.progress import LineProgress, time_left


class DownloadProgress(LineProgress):
    """Shows pictures per second, the success rate, the commonest failures and the time left.

    Args:
        pictures: of all parts.
    """

    def __init__(self, pictures: int) -> None:
        super().__init__("download")
        self._pictures = pictures
        self._at_first: int | None = None
        self._tally = Tally()

    def update(self, tally: Tally) -> None:
        """Show the pictures so far, those of earlier runs among them."""
        if self._at_first is None:
            self._at_first = tally.count
        self._tally = tally
        self.show(tally.count, self._pictures)

    def line(self, seconds: float) -> str:
        """One line of it, so many seconds after the beginning."""
        tally = self._tally
        rate = (tally.count - (self._at_first or 0)) / max(seconds, 1e-9)
        return (
            f"{tally.count:,} of {self._pictures:,} pictures, {rate:,.0f}/s, {tally.success_share:.0%} fetched, "
            f"{time_left(self._pictures - tally.count, rate)}; failed: {tally.failures(3)}"
        )
