"""A run's lines as TensorBoard's event files, in RUN_DIR/tensorboard: a file for each start, with samples as the axis.

A file begins by taking back what earlier files have from the same place on, and repeats the lines that they may lack.
So a restart after any end leaves no gap and no step twice.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vdtrain.errors import missing, one_line
from vdtrain.tracking.metrics import Line, flat

FOLDER = "tensorboard"
# Figures that records alone write, so that each has one value at a place.
PLACE = ("step", "phase", "resolution", "total_samples")
# Of an event; a greater length is damage.
MOST_BYTES = 1 << 30

# Of a block of code in Markdown.
FENCE = 3 * "`"


class TensorBoard:
    """See tracking.Sink.

    Args:
        file: holds all figures, whatever is written here.
    """

    def __init__(
        self,
        run_dir: Path,
        file: Path,
        run_config: Mapping[str, Any],
        lines: Sequence[Line],
        samples: int,
        warn: Callable[[str], None],
    ) -> None:
        self._run_dir, self._folder, self._metrics, self._warn = run_dir, run_dir / FOLDER, file, warn
        self._file: Any = None
        if (problem := missing("tensorboardX")) is not None:
            self._give_up(problem)
            return
        try:
            self._folder.mkdir(exist_ok=True)
            files = sorted(self._folder.glob("*.out.tfevents.*"))
            first, number = (min(_newest(files[-1]), samples), int(files[-1].name[:6]) + 1) if files else (0, 1)
            # Unbuffered: a process that is killed leaves every line whole.
            self._file = (self._folder / f"{number:06d}.out.tfevents.{time.time():.0f}").open("xb", buffering=0)
        except (OSError, ValueError) as error:
            self._give_up(one_line(error))
            return
        from tensorboardX.proto.event_pb2 import SessionLog

        self._event(0, file_version="brain.Event:2")
        self._event(first, session_log=SessionLog(status=SessionLog.START))
        text = yaml.safe_dump(dict(run_config), sort_keys=False, allow_unicode=True)
        self._text("configuration", f"{FENCE}\n{text}{FENCE}", first)
        self.send([line for line in lines if line["samples"] >= first])

    def send(self, lines: Sequence[Line]) -> None:
        """Write lines, oldest first."""
        from tensorboardX.proto.summary_pb2 import Summary

        for line in lines:
            left_out = ("samples",) if "loss" in line else ("samples", *PLACE)
            figures = {name: value for name, value in flat(line).items() if name not in left_out}
            values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
            if "image" in line:
                values = self._image(line)
            self._event(line["samples"], line.get("time"), summary=Summary(value=values))

    def alert(self, title: str, text: str, line: Line) -> None:
        """Write an alert as a text."""
        self._text(f"alert/{title}", text, line["samples"])

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _image(self, line: Line) -> list[Any]:
        from tensorboardX.proto.summary_pb2 import Summary

        path = self._run_dir / line["path"]
        try:
            with Image.open(path) as image:
                (width, height), channels = image.size, len(image.getbands())
            content = path.read_bytes()
        except OSError:
            # It was removed since.
            return []
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=content)
        return [Summary.Value(tag=line["image"], image=image)]

    def _text(self, name: str, text: str, samples: int) -> None:
        from tensorboardX import summary

        self._event(samples, summary=summary.text(name, text))

    def _event(self, samples: int, moment: float | None = None, **content: Any) -> None:
        """Append an event in TensorFlow's record format: length and content, each with its checksum."""
        if self._file is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        data = Event(wall_time=moment or time.time(), step=samples, **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        record = length + sums[0] + data + sums[1]
        try:
            if self._file.write(record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._give_up(one_line(error))

    def _give_up(self, reason: str) -> None:
        self.close()
        self._warn(f"{self._folder}: takes no more of this run ({reason}); its figures are in {self._metrics}")


def _newest(path: Path) -> int:
    """The samples of the last whole event of a file; 0 if the file is damaged."""
    from tensorboardX.proto.event_pb2 import Event

    samples, left = 0, path.stat().st_size
    try:
        with path.open("rb") as file:
            while left > 0:
                (length,) = struct.unpack("<Q", file.read(12)[:8])
                left -= length + 16
                if left < 0 or length > MOST_BYTES:
                    break
                samples = Event.FromString(file.read(length)).step
                file.read(4)
    # Damage shows in many ways; all is then written again.
    except Exception:
        return 0
    return samples
