"""How an index stands."""

from __future__ import annotations

from data_pipeline.progress import LineProgress, time_left


class IndexProgress(LineProgress):
    """Shows shards and megabytes per second, and the time left.

    Args:
        shards, total_bytes: to be read.
    """

    def __init__(self, shards: int, total_bytes: int) -> None:
        super().__init__("index")
        self._shards, self._bytes = shards, total_bytes
        self._shards_read = self._bytes_read = 0

    def add(self, size: int) -> None:
        """Another shard of so many bytes has been read."""
        self._shards_read += 1
        self._bytes_read += size
        self.show(self._bytes_read, self._bytes)

    def line(self, seconds: float) -> str:
        """One line of it, so many seconds after the beginning."""
        seconds = max(seconds, 1e-9)
        rate = self._bytes_read / seconds
        return (
            f"{self._shards_read:,} of {self._shards:,} shards, {self._shards_read / seconds:.1f} shards/s, "
            f"{rate / 1e6:,.0f} MB/s, {time_left(self._bytes - self._bytes_read, rate)}"
        )
