"""How the encoding of images stands."""

from __future__ import annotations

from data_pipeline.progress import LineProgress, time_left


class LatentProgress(LineProgress):
    """Shows this process's images, how many a second, and the time left.

    Args:
        resolution: of the images, in pixels.
        world_size: number of processes that share the work; each counts its own.
        silent: for all processes but one.
    """

    def __init__(self, resolution: int, world_size: int, silent: bool = False) -> None:
        super().__init__("latents", silent)
        self._resolution, self._world_size = resolution, world_size
        self._images = self._made = 0

    def expect(self, images: int) -> None:
        """So many more are this process's to make."""
        self._images = self._made + images

    def add(self, images: int) -> None:
        """So many have been made."""
        self._made += images
        self.show(self._made, self._images)

    def line(self, seconds: float) -> str:
        """One line of it, so many seconds after the beginning."""
        rate = self._made / max(seconds, 1e-9)
        whose = "" if self._world_size == 1 else f" of the first of {self._world_size} processes"
        return (
            f"{self._resolution}: {self._made:,} of {self._images:,} images{whose}, {rate:,.0f} images/s, "
            f"{time_left(self._images - self._made, rate)}"
        )
