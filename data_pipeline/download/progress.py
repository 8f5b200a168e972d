"""How a download stands."""

from __future__ import annotations

from data_pipeline.failures import Tally
from data_pipeline.progress import LineProgress, time_left


class DownloadProgress(LineProgress):
    """Shows images per second, the success rate, the commonest failures and the time left.

    Args:
        images: of all parts.
    """

    def __init__(self, images: int) -> None:
        super().__init__("download")
        self._images = images
        self._at_first: int | None = None
        self._tally = Tally()

    def update(self, tally: Tally) -> None:
        """Show the images so far, those of earlier runs among them."""
        if self._at_first is None:
            self._at_first = tally.count
        self._tally = tally
        self.show(tally.count, self._images)

    def line(self, seconds: float) -> str:
        """One line of it, so many seconds after the beginning."""
        tally = self._tally
        rate = (tally.count - (self._at_first or 0)) / max(seconds, 1e-9)
        return (
            f"{tally.count:,} of {self._images:,} images, {rate:,.0f}/s, {tally.success_share:.0%} fetched, "
            f"{time_left(self._images - tally.count, rate)}; failed: {tally.failures(3)}"
        )
