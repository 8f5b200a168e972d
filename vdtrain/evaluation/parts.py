"""The parts of an evaluation: one file for each part of the pairs and each flow. A file appears when it is whole.

    OUTPUT_DIR/settings.json                     the settings of all parts
    OUTPUT_DIR/parts/pairs-00000.safetensors     features of the real samples, "image/clip" [n, D] ...
    OUTPUT_DIR/parts/text-to-image-00000.safetensors   features of the generated ones, "clip" [n, D] ...
    OUTPUT_DIR/images/text-to-image/NAME.png     with keep_images, the images; the real ones are in images/real/

A part does not depend on the process that makes it, or on the number of processes.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vdtrain.config.compose import ConfigError
from vdtrain.errors import system_error, unreadable, unwritable
from vdtrain.files import SHAPE_ERRORS, read_json, write_text, written_whole
from vdtrain.redaction import redacted
from vdtrain.weights.folder import write_safetensors

SETTINGS_FILE, FOLDER = "settings.json", "parts"
PAIRS = "pairs"
# Of the real samples: their names, and the captions that captions are compared with.
NAME, REFERENCES = "name", "references"
# What a sample was made from, if that is not its pair's: features and the samples themselves.
CONTEXT = "context"
IMAGES, REAL = "images", "real"
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
    """The contents of all parts: features [N, D] by name, lists by name, and samples for the contact sheet."""

    features: dict[str, Tensor]
    captions: dict[str, list[Any]]
    shown: dict[str, Any]


class Parts:
    """The parts of one evaluation.

    Args:
        folder: `output_dir`.
        samples: number of all pairs.
        part_samples: pairs in a part.
        keep_images: whether images are kept beside the parts.
    """

    def __init__(self, folder: Path, samples: int, part_samples: int, keep_images: bool = False) -> None:
        self.folder, self.samples, self.keep_images = folder, samples, keep_images
        starts = range(0, samples, part_samples)
        self.parts = [Part(number, start, min(start + part_samples, samples)) for number, start in enumerate(starts)]

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write this evaluation's settings, or compare them with those in the folder.

        Raises:
            ConfigError: the folder has an evaluation with other settings, or cannot be written.
        """
        place, path = f"output_dir={self.folder}", self.folder / SETTINGS_FILE
        now = redacted(json.loads(json.dumps(settings)))
        try:
            before = read_json(path)
            if not isinstance(before, dict):
                raise ValueError("no table of settings")
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
        """Write a part's features [n, D] and lists. The first part also has a few of its images.

        Args:
            samples: by name, a list of captions or uint8 [n, 3, H, W]; with `keep_images`, also their names.

        Raises:
            ConfigError: the file cannot be written.
        """
        tensors = {key: value.float() for key, value in features.items()}
        captions = {key: list(value) for key, value in samples.items() if not isinstance(value, Tensor)}
        images = {key: value for key, value in samples.items() if isinstance(value, Tensor)}
        if self.keep_images and "image" in images:
            self._keep(self.images(name), images["image"], captions[NAME])
        if part.number == 0:
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
        captions: dict[str, list[Any]] = {}
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
                        kept = [key for key in file.keys() if key.startswith("shown/")]  # noqa: SIM118 - not a mapping
                        shown |= {key.removeprefix("shown/"): file.get_tensor(key) for key in kept}
            except (SafetensorError, OSError, RecursionError, *SHAPE_ERRORS) as error:
                found = system_error(error)
                if found is not None and found.errno not in (None, errno.ENOENT):
                    raise ConfigError(f"{path}: {unreadable(found, path, 'see that it can be read')}") from error
                raise ConfigError(f"{path}: is missing or damaged ({error}); remove it and evaluate again") from error
        shown |= {key: texts[:SHOWN] for key, texts in captions.items()}
        return PartContents({feature: torch.cat(gathered) for feature, gathered in rows.items()}, captions, shown)

    def images(self, name: str) -> Path:
        """The folder of a flow's images, or of the real ones."""
        return self.folder / IMAGES / (REAL if name == PAIRS else name)

    def _keep(self, folder: Path, images: Tensor, names: Sequence[str]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, image in zip(names, images.permute(0, 2, 3, 1).numpy(), strict=True):
                # The part is written when all of its images are.
                Image.fromarray(image).save(folder / f"{name}.png")
        except OSError as error:
            raise ConfigError(f"output_dir={self.folder}: {unwritable(error, folder)}") from error

    def _path(self, part: Part, name: str) -> Path:
        return self.folder / FOLDER / f"{name}-{part.number:05d}.safetensors"

    def _has(self, part: Part, name: str, features: set[str]) -> bool:
        """Whether a part's file exists with these features, for at least as many pairs, and its images if kept."""
        try:
            with safe_open(self._path(part, name), framework="pt") as file:
                whole = features <= set(file.keys()) and int(file.metadata()["samples"]) >= len(part)
                if not (
                    whole and self.keep_images and (name == PAIRS or name.partition("-guidance-")[0].endswith("image"))
                ):
                    return whole
                names = json.loads(file.metadata()["captions"]).get(NAME)
        except (OSError, SafetensorError, *SHAPE_ERRORS):
            return False
        return names is not None and all((self.images(name) / f"{each}.png").exists() for each in names[: len(part)])
