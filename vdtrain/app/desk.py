"""What the page asks for, made by one model, one request after another."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vdtrain.commands import blend, edit, sample
from vdtrain.config.command_line import shell
from vdtrain.config.command_schema import AppConfig
from vdtrain.config.compose import SCHEMAS, compose, to_object
from vdtrain.config.fields import check_values
from vdtrain.config.overrides import Override, word_for
from vdtrain.diffusion.sampling import Progress
from vdtrain.inference.checkpoint import Described
from vdtrain.inference.sampler import Sampler, notes
from vdtrain.pipeline import VersatileDiffusion

# Settings of the command line that hold for every request.
FIXED = ("checkpoint", "trust", "weights", "device", "precision", "threads", "batch_size")
COMMANDS = {"sample": sample, "blend": blend, "edit": edit}
# Sampling steps done and in all, of which part of how many.
Report = Callable[[int, int, int, int], None]
# Settings of a command, each as its value.
Settings = Mapping[str, Any]


class StoppedError(Exception):
    """The person stopped the sampling."""


@dataclass
class Result:
    """What a request made.

    Attributes:
        images: PNG files with their settings in the metadata.
        captions: made, or those of an edited image.
        files: all that was written.
        notes: lines for the person.
        commands: what makes the same, typed beside the uploaded files.
    """

    images: list[Path]
    captions: list[str]
    files: list[Path]
    notes: list[str]
    commands: list[str]


class Desk:
    """Takes requests for samples.

    Args:
        config: of the command line, settled.
        checkpoint, model: what it names.
    """

    def __init__(self, config: AppConfig, checkpoint: Described, model: VersatileDiffusion) -> None:
        self.config, self.checkpoint, self.model = config, checkpoint, model
        self._turn, self._numbers = threading.Lock(), itertools.count(1)
        # The person of each request that waits for its turn or is made, and what stops it.
        self._stops: list[tuple[str, threading.Event]] = []
        self._changing = threading.Lock()

    def stop(self, person: str) -> bool:
        """End what is made for a person, or waits for its turn, at its next step. Nothing of it is kept.

        Returns:
            Whether there was anything: a request that has ended keeps its results.
        """
        with self._changing:
            found = [stop for owner, stop in self._stops if owner == person]
            for each in found:
                each.set()
            return bool(found)

    def _end(self, stop: threading.Event) -> bool:
        """Let a request be stopped no more; whether it was."""
        with self._changing:
            self._stops = [each for each in self._stops if each[1] is not stop]
            return stop.is_set()

    def make(self, person: str, command: str, parts: Callable[[Path], Sequence[Settings]], report: Report) -> Result:
        """Run a command: sample, blend or edit.

        Args:
            person: whose request it is.
            parts: settings of each time that the command runs, from the folder of the results, which it may write to.

        Raises:
            ConfigError: a setting or an input is wrong.
            StoppedError: `stop` was called.
        """
        stop = threading.Event()
        with self._changing:
            self._stops.append((person, stop))
        try:
            with self._turn:
                folder = Path(self.config.output_dir) / f"{time.strftime('%Y%m%d-%H%M%S')}-{next(self._numbers):03d}"
                result = Result([], [], [], [], [])
                try:
                    _check(stop)
                    runs = parts(folder)
                    for number, settings in enumerate(runs):
                        place = folder / f"{number:02d}" if len(runs) > 1 else folder
                        self._run(command, settings, place, _watched(stop, report, number, len(runs)), result)
                    # The page has said "stopped", even if that was after the last step.
                    if self._end(stop):
                        raise StoppedError
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                return result
        finally:
            self._end(stop)

    def _run(self, command: str, settings: Settings, folder: Path, progress: Progress, result: Result) -> None:
        fixed = {name: value for name in FIXED if (value := getattr(self.config, name)) is not None}
        given = fixed | dict(settings) | {"output_dir": str(folder)}
        # A prompt that looks like the name of a file is one: here nobody types such names.
        overrides = {"literal": True} | given
        raw_config = compose(command, [Override(key, "", key, None, given=value) for key, value in overrides.items()])
        config: Any = to_object(raw_config, SCHEMAS[command])
        check_values(config)
        action: Callable[..., int] = getattr(COMMANDS[command], command)
        action(config, raw_config, lambda config, raw: _Sampler(config, raw, self, progress, result))
        result.commands.append(_typed(command, given))


class _Sampler(Sampler):
    """Samples with the model of a desk, and adds what it writes to a result."""

    def __init__(self, config: Any, raw_config: DictConfig, desk: Desk, progress: Progress, result: Result) -> None:
        super().__init__(config, raw_config, desk.checkpoint)
        self.desk, self.result, self.watched = desk, result, progress

    def load(self, output: str, what: str) -> VersatileDiffusion:
        """The model that is loaded."""
        self.result.notes += [note for note in notes(self.config, self.checkpoint) if note not in self.result.notes]
        return self.desk.model

    def progress(self, turns: Sequence[int]) -> Iterable[int]:
        """Report the sampling steps."""
        return self.watched(turns)

    def say(self, captions: Sequence[str]) -> None:
        """Keep captions for the page."""
        self.result.captions += captions

    def write(self, modality: str, samples: Any) -> int:
        """Write samples, and keep their files for the page."""
        files = self.keep(modality, samples)
        if modality == "image":
            self.result.images += files
        else:
            self.say(samples)
            files = [*files, files[0].with_suffix(".json")]
        self.result.files += files
        return 0


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise StoppedError


def _watched(stop: threading.Event, report: Report, part: int, parts: int) -> Progress:
    """Reports sampling steps, and ends them when `stop` is set."""

    def progress(turns: Sequence[int]) -> Iterable[int]:
        for number, turn in enumerate(turns):
            _check(stop)
            report(number, len(turns), part, parts)
            yield turn
        _check(stop)

    return progress


def _typed(command: str, settings: Settings) -> str:
    """A command line that makes the same, with uploaded files by their names."""
    usual = compose(command, [])
    words, plain = ["vdtrain", command, str(settings["checkpoint"])], []
    for key, value in settings.items():
        if key in ("checkpoint", "output_dir") or value == OmegaConf.select(usual, key):
            continue
        if key == "inputs":
            plain = [Path(each).name if Path(each).is_absolute() else each for each in value]
        elif isinstance(value, str):
            words.append(word_for(key, value))
        else:
            words.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    return shell([*words, *(["--"] if any("=" in each or each.startswith("-") for each in plain) else []), *plain])
