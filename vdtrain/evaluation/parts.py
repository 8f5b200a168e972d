"""The parts of an evaluation: one file for each part of the pairs and each flow. A file appears when it is whole.

    OUTPUT_DIR/settings.json                     the settings of all parts
    OUTPUT_DIR/parts/pairs-00000.safetensors     features of the real samples, "image/clip" [n, D] ...
    OUTPUT_DIR/parts/text-to-image-00000.safetensors   features of the generated ones, "clip" [n, D] ...

A part does not depend on the process that makes it, or on the number of processes.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vdtrain.config.compose import ConfigError
from vdtrain.errors import system_error, unreadable
from vdtrain.files import write_text, written_whole
from vdtrain.weights.folder import write_safetensors

SETTINGS_FILE, FOLDER = "settings.json", "parts"
PAIRS = "pairs"
# Samples of the first part that are kept for the contact sheet.
SHOWN = 8


@dataclass(frozen=True)
class Part:
    """Pairs `start` ... `stop - 1`; the same in every evaluation with this size of parts."""

    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class PartContents:
    """The contents of all parts: features [N, D] by name, captions by name, and samples for the contact sheet."""

    features: dict[str, Tensor]
    captions: dict[str, list[str]]
    shown: dict[str, Any]


class Parts:
    """The parts of one evaluation.

    Args:
        folder: `output_dir`.
        samples: number of all pairs.
        part_samples: pairs in a part.
    """

    def __init__(self, folder: Path, samples: int, part_samples: int) -> None:
        self.folder = folder
        starts = range(0, samples, part_samples)
        self.parts = [Part(number, start, min(start + part_samples, samples)) for number, start in enumerate(starts)]

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write this evaluation's settings, or compare them with those in the folder.

        Raises:
            ConfigError: the folder has an evaluation with other settings, or cannot be written.
        """
        place, path = f"output_dir={self.folder}", self.folder / SETTINGS_FILE
        now = json.loads(json.dumps(settings))
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            with written_whole(path, place) as draft:
                write_text(draft, json.dumps(now, indent=2) + "\n")
            return
        except OSError as error:
            raise ConfigError(f"{place}: {SETTINGS_FILE} {unreadable(error, path, 'give another folder')}") from error
        except ValueError as error:
            raise ConfigError(
                f"{place}: {SETTINGS_FILE} is damaged ({error}); give another folder, or remove {self.folder}"
            ) from error
        for name in now:
            if before.get(name) != now[name]:
                raise ConfigError(
                    f"{place}: holds an evaluation with another {name} ({before.get(name)}, now {now[name]}); "
                    "give another output_dir"
                )

    def missing(self, names: Sequence[str], features: Mapping[str, set[str]]) -> list[tuple[int, str]]:
        """(number, name) of the files that are not made yet, part by part.

        Args:
            features: by name, the features that a file must have.
        """
        return [
            (part.number, name) for part in self.parts for name in names if not self._has(part, name, features[name])
        ]

    def write(self, part: Part, name: str, features: Mapping[str, Tensor], samples: Mapping[str, Any]) -> None:
        """Write a part's features [n, D] and captions. The first part also has a few of its images.

        Args:
            samples: by name, a list of captions or uint8 [n, 3, H, W].

        Raises:
            ConfigError: the file cannot be written.
        """
        tensors = {key: value.float() for key, value in features.items()}
        captions = {key: list(value) for key, value in samples.items() if not isinstance(value, Tensor)}
        if part.number == 0:
            images = {key: value for key, value in samples.items() if isinstance(value, Tensor)}
            tensors |= {f"shown/{key}": value[:SHOWN] for key, value in images.items()}
        metadata = {"samples": str(len(part)), "captions": json.dumps(captions)}
        path = self._path(part, name)
        with written_whole(path, f"output_dir={self.folder}", overwrite=True) as draft:
            write_safetensors(draft, tensors, metadata)

    def read(self, name: str, wanted: set[str]) -> PartContents:
        """All parts of a flow, or of the pairs, as one.

        Raises:
            ConfigError: a part is missing or damaged.
        """
        rows: dict[str, list[Tensor]] = {feature: [] for feature in sorted(wanted)}
        captions: dict[str, list[str]] = {}
        shown: dict[str, Any] = {}
        for part in self.parts:
            path = self._path(part, name)
            try:
                with safe_open(path, framework="pt") as file:
                    for feature, gathered in rows.items():
                        gathered.append(file.get_slice(feature)[: len(part)])
                    for key, texts in json.loads(file.metadata()["captions"]).items():
                        captions.setdefault(key, []).extend(texts[: len(part)])
                    if part.number == 0:
                        shown |= {key.removeprefix("shown/"): file.get_tensor(key) for key in _shown(file)}
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                found = system_error(error)
                if found is not None and found.errno not in (None, errno.ENOENT):
                    raise ConfigError(f"{path}: {unreadable(found, path, 'see that it can be read')}") from error
                raise ConfigError(f"{path}: is missing or damaged ({error}); remove it and evaluate again") from error
        shown |= {key: texts[:SHOWN] for key, texts in captions.items()}
        return PartContents({feature: torch.cat(gathered) for feature, gathered in rows.items()}, captions, shown)

    def _path(self, part: Part, name: str) -> Path:
        return self.folder / FOLDER / f"{name}-{part.number:05d}.safetensors"

    def _has(self, part: Part, name: str, features: set[str]) -> bool:
        """Whether a part's file exists with these features, for at least as many pairs."""
        try:
            with safe_open(self._path(part, name), framework="pt") as file:
                return features <= set(file.keys()) and int(file.metadata()["samples"]) >= len(part)
        except (OSError, SafetensorError):
            return False


def _shown(file: Any) -> Iterator[str]:
    return (key for key in file.keys() if key.startswith("shown/"))  # noqa: SIM118 - not a mapping
