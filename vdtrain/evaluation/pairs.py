"""The real samples of an evaluation, by their positions: pairs of a manifest, or a folder of images."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import defaultdict
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import torch

from vdtrain.config.command_schema import EvaluateConfig
from vdtrain.config.compose import ConfigError
from vdtrain.config.instantiate import find_target, instantiate
from vdtrain.data.batch import BatchStream
from vdtrain.data.loading import check_split, data_problem
from vdtrain.data.manifest import ManifestError
from vdtrain.data.order import Split
from vdtrain.data.stream import PairStream, StreamError
from vdtrain.evaluation.named import Names, read_texts, stem
from vdtrain.evaluation.parts import NAME, REFERENCES, Part
from vdtrain.evaluation.pictures import list_pictures, read_real, stamp
from vdtrain.flows import Flow
from vdtrain.inference.sampler import side_of
from vdtrain.storage.patience import patience_of

# Settings of `data.stream` that differ from training, if the stream has them: every image once, unchanged.
OVERRIDES = {"random_crop": False, "min_side": 1, "weights": None, "latents": None, "prefetch": 0}
MOST_SAMPLES = 30_000
SHOWN = ("image", "text")
# Characters of a file name that is made of a sample's name.
LONGEST = 150


class RealSamples(Protocol):
    """Real samples by position.

    Attributes:
        identity: changes when other samples are there.
        modalities: those of each sample.
        count: how many there are; None if that is not known.
    """

    identity: str
    modalities: frozenset[str]
    count: int | None

    def read(self, part: Part) -> dict[str, Any]:
        """The samples of a part by modality; beside them their names, and lists of captions as references."""

    def arrange(self, given: Sequence[str], samples: int) -> list[int] | str:
        """For each of the first `samples` positions the number of its name among those given.

        Returns:
            The first name without a partner, if there is one.
        """


class Pairs:
    """The first pairs of a manifest in the order of the data set's own stream (`vdtrain.data.batch.BatchStream`).

    Args:
        held_out: identity of the data of a checkpoint's run, and the share of their pairs that it held out. These pairs
            are taken if `data.validation.share` is null and the data are the same.
        flows: that are evaluated. With `data.stream.members`, the pairs that have all of their modalities are taken.

    Attributes:
        share: of the data's pairs that is held out; these alone are evaluated. 0: all.

    Raises:
        ConfigError: the manifest is missing, or the stream cannot be built.
    """

    def __init__(
        self, config: EvaluateConfig, held_out: tuple[str, float] = ("", 0.0), flows: Sequence[Flow] = ()
    ) -> None:
        self.config = config
        self.share = config.data.validation.share or 0.0
        if self.share:
            check_split(config.data)
        target, _ = find_target(config.data.stream, "data.stream")
        parameters = inspect.signature(target).parameters
        overrides = OVERRIDES | {"patience": patience_of(config.watchdog_seconds)}
        self._overrides: dict[str, Any] = {name: value for name, value in overrides.items() if name in parameters}
        needed = {part for flow in flows for part in (flow.context, flow.output)}
        self.modalities = frozenset({*SHOWN, *needed})
        if config.data.stream.get("members") and "need" in parameters:
            # Of a mixed set, the pairs that have what the flows are from and to.
            self.modalities = frozenset(needed)
            self._overrides["need"] = sorted(needed)
        stream = self._open(0)
        self.identity: str = getattr(stream, "identity", "")
        if config.data.validation.share is None and self.identity and self.identity == held_out[0]:
            self.share = held_out[1]
        if self.identity and "need" in self._overrides:
            self.identity += f", those with {' and '.join(self._overrides['need'])}"
        if self.share:
            # Other pairs make another evaluation.
            self.identity += f", held out {self.share:g}"
            stream.close()
            stream = self._open(0)
        self.count: int | None = len(stream) if isinstance(stream, Sized) else None
        stream.close()
        self._references = References.of(config)

    def read(self, part: Part) -> dict[str, Any]:
        """The samples of a part; a stream without names gives them their positions.

        Raises:
            ConfigError: the pairs cannot be read, or the file of references is of others.
        """
        stream = self._open(part.number)
        try:
            batch = next(iter(stream))
        except (StreamError, ManifestError, OSError) as error:
            raise ConfigError(data_problem(error, self.config.data.manifest)) from error
        finally:
            stream.close()
        order = torch.argsort(batch.positions)
        order = order[batch.positions[order] < part.stop]
        batch = batch.take(order)
        found = {name: samples for name, samples in batch.samples.items() if name in self.modalities or not batch.rows}
        names = list(batch.names) or [f"{position:08d}" for position in batch.positions.tolist()]
        if self._references is not None:
            found[REFERENCES] = [
                self._references.of_pair(name, text) for name, text in zip(names, found["text"], strict=True)
            ]
        return found | {NAME: [file_stem(name) for name in names]}

    def arrange(self, given: Sequence[str], samples: int) -> list[int] | str:
        """See `RealSamples`; the pairs' order stays."""
        stream, size = self._open(0), self.config.part_samples
        try:
            names: list[str] = []
            for number in range(-(-samples // size)):
                if not isinstance(stream, PairStream):
                    names += [f"{position:08d}" for position in range(number * size, (number + 1) * size)]
                else:
                    names += map(file_stem, stream.names(number))
        except (ManifestError, OSError) as error:
            raise ConfigError(data_problem(error, self.config.data.manifest)) from error
        finally:
            stream.close()
        finder, found = Names(given), list[int]()
        for name in names[:samples]:
            partner = finder.find(name)
            if partner is None:
                return name
            found.append(partner)
        return found

    def _open(self, number: int) -> BatchStream:
        """The stream, at the start of a part."""
        config = self.config
        try:
            stream: BatchStream = instantiate(
                {**config.data.stream, **self._overrides},
                "data.stream",
                manifest=Path(config.data.manifest),
                **({"split": Split(self.share, held_out=True)} if self.share else {}),
                seed=config.seed,
                resolution=config.resolution,
                global_batch_size=config.part_samples,
                rank=0,
                world_size=1,
                start=number * config.part_samples,
                workers=config.loader_workers,
            )
        except (ManifestError, StreamError, OSError) as error:
            raise ConfigError(data_problem(error, config.data.manifest)) from error
        return stream


class PictureFolder:
    """The images of a folder, in the order of their names, with the captions of `data.references` if it is given.

    Raises:
        ConfigError: the folder or the file cannot be read, or an image has no caption there.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config, self.setting = config, f"real_images={config.real_images}"
        pictures = list_pictures(Path(str(config.real_images)), "real_images")
        self.names, self.paths = list(pictures), list(pictures.values())
        self.count: int | None = len(pictures)
        described = [(name, stamp(path)) for name, path in pictures.items()]
        self.identity = hashlib.blake2b(repr(described).encode(), digest_size=8).hexdigest()
        self._references = References.of(config)
        self.modalities = frozenset(("image", "text") if self._references is not None else ("image",))

    def read(self, part: Part) -> dict[str, Any]:
        """The samples of a part."""
        own, config = slice(part.start, part.stop), self.config
        found: dict[str, Any] = {
            "image": read_real(self.paths[own], side_of(config), self.setting, config.loader_workers),
            NAME: [file_stem(stem(name)) for name in self.names[own]],
        }
        if self._references is not None:
            found[REFERENCES] = [self._references.find(name) for name in self.names[own]]
            found["text"] = [each[0] for each in found[REFERENCES]]
        return found

    def arrange(self, given: Sequence[str], samples: int) -> list[int] | str:
        """See `RealSamples`; the images take the order of the names given, and the others are left out."""
        finder, found = Names(self.names), list[int]()
        for name in given[:samples]:
            if (number := finder.find(name)) is None:
                return name
            found.append(number)
        self.names, self.paths = [self.names[each] for each in found], [self.paths[each] for each in found]
        return list(range(samples))


class References:
    """The captions of each image, of a file such as COCO's or `pack` writes."""

    def __init__(self, path: Path) -> None:
        self.place = f"data.references={path}"
        captions: defaultdict[str, list[str]] = defaultdict(list)
        for name, text in read_texts(path, "data.references"):
            captions[name].append(text)
        self._captions = list(captions.values())
        self._names = Names(captions)

    @classmethod
    def of(cls, config: EvaluateConfig) -> References | None:
        """Those of the configuration, if it names any."""
        return None if config.data.references is None else cls(Path(config.data.references))

    def find(self, name: str) -> list[str]:
        """The captions of an image by its name."""
        number = self._names.find(name)
        if number is None:
            raise ConfigError(f"{self.place}: has no caption of {name}; add one, or take the image away")
        return self._captions[number]

    def of_pair(self, name: str, caption: str) -> list[str]:
        """The captions of a pair; its own must be among them, because names of other data sets may look alike."""
        found = self.find(name)
        if " ".join(caption.split()) not in found:
            raise ConfigError(
                f"{self.place}: is of other images: {caption!r}, the caption of {name}, is not in it; give the file "
                "that `python -m data_pipeline pack` wrote beside these shards, or null"
            )
        return found


def file_stem(name: str) -> str:
    """A file name, without its ending, of a sample's name: packed-000000-000000042 for ../packed/000000/000000042."""
    short = re.sub(r"[^\w.]+", "-", re.sub(r"^(\.*/)+", "", name)).strip("-.") or "sample"
    if len(short) <= LONGEST:
        return short
    return f"{short[:LONGEST]}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"


def check_count(pairs: RealSamples, samples: int, config: EvaluateConfig) -> None:
    """Refuse more samples than there are.

    Raises:
        ConfigError: there are fewer.
    """
    if pairs.count is not None and pairs.count < samples:
        place = "data.manifest" if config.real_images is None else "real_images"
        folder = config.data.manifest if config.real_images is None else config.real_images
        held_out = "held-out " * bool(getattr(pairs, "share", 0))
        kind, more = (
            (f"{held_out}pairs", "index more shards") if config.real_images is None else ("images", "add images")
        )
        raise ConfigError(
            f"samples={samples}: {place}={folder} has {pairs.count} {kind}; set samples={pairs.count}, or {more}"
        )
