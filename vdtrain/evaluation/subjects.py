"""What is measured: the flows of a checkpoint, or images and captions that another program made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vdtrain.config.command_schema import EvaluateConfig
from vdtrain.config.compose import ConfigError
from vdtrain.config.schema import ModelConfig
from vdtrain.evaluation.named import CAPTIONS, PROMPTS, SUFFIXES, Names, read_texts
from vdtrain.evaluation.pairs import MOST_SAMPLES, RealSamples, check_count
from vdtrain.evaluation.parts import Part
from vdtrain.evaluation.pictures import check_generated, list_pictures, stamp
from vdtrain.files import FileRecord
from vdtrain.flows import Flow
from vdtrain.inference.checkpoint import describe
from vdtrain.inference.sampler import DTYPES, SAMPLING, check_sampler, notes, side_of
from vdtrain.media import BYTES, read_images
from vdtrain.pipeline import VersatileDiffusion
from vdtrain.training.continuation import held_out_of

# Settings that do not change the samples.
FREE = ("batch_size",)
PROMPT_FILES = tuple(f"{stem}{suffix}" for stem in ("prompts", "metadata", "captions") for suffix in SUFFIXES)
# Called with the share of the part that is done.
Advance = Callable[[str, float], None]


@dataclass(frozen=True)
class Variant:
    """A flow at a guidance scale; None for the one of `guidance_scale`."""

    flow: Flow
    scale: float | None = None

    @property
    def name(self) -> str:
        return self.flow.name if self.scale is None else f"{self.flow.name}-guidance-{self.scale:g}"


class Subject(Protocol):
    """What is measured; by default files that another program made.

    Attributes:
        model: the model whose CLIP scores by default.
        variants: what it has samples of.
        reads_pairs: whether its samples are made from the real ones.
        brings_contexts: whether its samples come with what they were made from.
        aligned: whether each sample has its partner among the real ones.
        held_out: identity of the data that it was trained on, and the share of their pairs that was held out.
    """

    model: ModelConfig
    variants: list[Variant]
    reads_pairs: bool = False
    brings_contexts: bool = False
    aligned: bool = False
    held_out: tuple[str, float] = ("", 0.0)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What its samples depend on."""

    def described(self) -> dict[str, Any]:
        """The entry in metrics.json."""

    def remarks(self) -> Iterator[str]:
        """Warnings for the user."""
        return iter(())

    def join(self, pairs: RealSamples) -> tuple[int, int]:
        """Find its samples' partners among the real ones; returns the numbers of its samples and of real ones.

        Raises:
            ConfigError: there are too few of either, or one that is needed has no partner.
        """

    def load(self, device: str) -> None:
        """Load what makes samples."""
        return

    def make(self, variant: Variant, part: Part, real: Mapping[str, Any], advance: Advance) -> tuple[Any, Any]:
        """The samples of a part, and what they were made from if that is not among the real samples."""


def subject_of(config: EvaluateConfig) -> Subject:
    """What the settings name.

    Raises:
        ConfigError: settings that contradict each other, or name what cannot be measured.
    """
    if config.images is not None and config.captions is not None:
        raise ConfigError(f"captions={config.captions}: images= is given too; measure them one after the other")
    if config.images is None and config.captions is None:
        if config.prompts is not None:
            raise ConfigError(f"prompts={config.prompts}: belongs to images=FOLDER, which is not given")
        return Checkpoint(config)
    given = "images" if config.images is not None else "captions"
    for setting, default in (("guidance_scales", []), ("keep_images", False)):
        if getattr(config, setting) != default:
            raise ConfigError(
                f"{setting}: is for a checkpoint's samples, and {given}= has samples already; leave it out"
            )
    return GivenImages(config) if config.images is not None else GivenCaptions(config)


class Checkpoint(Subject):
    """The flows of a model. Nothing is loaded before `load`.

    Raises:
        ConfigError: there is no checkpoint, it names a class that is not trusted, or a setting does not fit it.
    """

    reads_pairs = aligned = True

    def __init__(self, config: EvaluateConfig) -> None:
        self.config, self.found = config, (found := describe(config))
        if found.state:
            self.held_out = held_out_of(found.state)
        self.model, self.path = found.model, found.path
        # The folder's index has the checksums of all its files.
        self.sha256 = FileRecord.of(found.record).sha256
        scales = _scales(config)
        flows = _flows(config.flows, found.groups, self.path)
        self.variants = [Variant(flow, scale) for flow in flows for scale in scales]
        check_sampler(config, self.model)

    @property
    def settings(self) -> Mapping[str, Any]:
        config = self.config
        left_out = (*FREE, *(["guidance_scale"] if config.guidance_scales else []))
        sampling = {name: getattr(config, name) for name in SAMPLING if name not in left_out}
        return {
            "checkpoint": self.sha256,
            "weights": config.weights,
            **sampling,
            "precision": config.precision,
        }

    def described(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "weights": self.config.weights,
            "model": self.model.name,
        }

    def remarks(self) -> Iterator[str]:
        yield from notes(self.config, self.found)

    def join(self, pairs: RealSamples) -> tuple[int, int]:
        samples = MOST_SAMPLES if self.config.samples is None else self.config.samples
        check_count(pairs, samples, self.config)
        for variant in self.variants:
            if variant.flow.context in ("image", "text") and variant.flow.context not in pairs.modalities:
                raise ConfigError(
                    f"real_images={self.config.real_images}: has no captions for {variant.flow}; name their file by "
                    "data.references, or leave the flow out of flows"
                )
        return samples, samples

    def load(self, device: str) -> None:
        config = self.config
        self._pipeline = VersatileDiffusion.from_checkpoint(
            str(self.path), config.weights, device, DTYPES[config.precision], config.trust
        )

    def make(self, variant: Variant, part: Part, real: Mapping[str, Any], advance: Advance) -> tuple[Any, Any]:
        config = self.config
        batch = len(part) / -(-len(part) // config.batch_size)
        settings = {name: getattr(config, name) for name in SAMPLING} | {"seed": config.seed + part.start}
        if variant.scale is not None:
            settings["guidance_scale"] = variant.scale

        def steps(turns: Sequence[int]) -> Iterator[int]:
            for turn in turns:
                yield turn
                advance(f"step {turn}", batch / len(turns))

        given = real[variant.flow.context]
        return self._pipeline.generate(variant.flow.name, given, progress=steps, output_type=BYTES, **settings), None


class GivenImages(Subject):
    """A folder of images with their prompts.

    Raises:
        ConfigError: a prompt without its image or the reverse, a broken image, or one of another size.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config, self.model = config, config.model
        flow = _given_flow(config, "text-to-image")
        self.variants, self.brings_contexts = [Variant(flow)], flow.context == "text"
        folder = Path(str(config.images))
        pictures = list_pictures(folder, "images")
        self.names, self.paths = list(pictures), list(pictures.values())
        self.prompts: list[str] = []
        if self.brings_contexts:
            file, rows = _prompts(config, folder, pictures)
            self._take(_matched(rows, self.names, file, folder), [text for _, text in rows])
        check_generated(self.paths, side_of(config), f"images={folder}", config.loader_workers)

    def _take(self, order: Sequence[int], prompts: Sequence[str]) -> None:
        self.names, self.paths = [self.names[each] for each in order], [self.paths[each] for each in order]
        self.prompts = list(prompts)

    @property
    def settings(self) -> Mapping[str, Any]:
        described = [(name, stamp(path)) for name, path in zip(self.names, self.paths, strict=True)]
        return {"images": _digest([described, self.prompts]), "seed": self.config.seed}

    def described(self) -> dict[str, Any]:
        return {"path": str(self.config.images), "images": len(self.paths)}

    def join(self, pairs: RealSamples) -> tuple[int, int]:
        config = self.config
        samples = _samples(config, len(self.paths), f"images={config.images}", "pictures")
        enough = pairs.count is None or pairs.count >= samples
        order = pairs.arrange(self.names, samples) if enough else "the images beyond"
        if not isinstance(order, str):
            self._take(order, [self.prompts[number] for number in order] if self.prompts else [])
            self.aligned = True
            return samples, samples
        if not self.brings_contexts:
            raise ConfigError(
                f"images={config.images}: {self.variants[0].flow} needs the image that each was made from, and there "
                f"is none for {order} by its name; name them alike"
            )
        real = config.samples or min(MOST_SAMPLES, pairs.count or MOST_SAMPLES)
        check_count(pairs, real, config)
        return samples, real

    def make(self, variant: Variant, part: Part, real: Mapping[str, Any], advance: Advance) -> tuple[Any, Any]:
        own, side = slice(part.start, part.stop), side_of(self.config)
        made = read_images([str(path) for path in self.paths[own]], (side, side))
        advance("reading", len(part))
        return made, self.prompts[own] if self.brings_contexts else None


class GivenCaptions(Subject):
    """Captions by the names of their images.

    Raises:
        ConfigError: the file cannot be read, or has two captions of an image.
    """

    aligned = True

    def __init__(self, config: EvaluateConfig) -> None:
        self.config, self.model = config, config.model
        self.variants = [Variant(_given_flow(config, "image-to-text"))]
        self.rows = read_texts(Path(str(config.captions)), "captions", CAPTIONS)
        self._place = f"captions={config.captions}"
        _refuse_repeated([name for name, _ in self.rows], self._place)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"captions": _digest(self.rows), "seed": self.config.seed}

    def described(self) -> dict[str, Any]:
        return {"path": str(self.config.captions), "captions": len(self.rows)}

    def join(self, pairs: RealSamples) -> tuple[int, int]:
        config = self.config
        samples = _samples(config, len(self.rows), self._place, "captions")
        if self.variants[0].flow.context not in pairs.modalities:
            raise ConfigError(f"{self._place}: text-to-text needs the texts; name their file by data.references")
        if config.real_images is None:
            check_count(pairs, samples, config)
        order = pairs.arrange([name for name, _ in self.rows], samples)
        if isinstance(order, str):
            missing = (
                f"has no caption of {order}, a pair of data.manifest={config.data.manifest}"
                if config.real_images is None
                else f"{order} is no picture of real_images={config.real_images}"
            )
            raise ConfigError(f"{self._place}: {missing}; correct the names, or leave it out")
        self.rows = [self.rows[number] for number in order]
        return samples, samples

    def make(self, variant: Variant, part: Part, real: Mapping[str, Any], advance: Advance) -> tuple[Any, Any]:
        advance("reading", len(part))
        return [text for _, text in self.rows[part.start : part.stop]], None


def _flows(names: Sequence[str], groups: set[str], path: Path) -> list[Flow]:
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"flows={list(names)}: name at least one flow, each once, e.g. [text-to-image]")
    flows = [_flow(name) for name in names]
    for flow in flows:
        if absent := [group for group in flow.groups if group not in groups]:
            raise ConfigError(f"flows: {flow}: {path} has no layers {absent[0]}; leave it out")
    return flows


def _flow(name: str) -> Flow:
    try:
        return Flow.parse(name)
    except ValueError as error:
        raise ConfigError(f"flows: {error}") from error


def _given_flow(config: EvaluateConfig, usual: str) -> Flow:
    """The one flow in `flows` if it is one, else the usual flow of what is given."""
    flow, wanted = _flow(config.flows[0] if len(config.flows) == 1 else usual), _flow(usual)
    if flow.output != wanted.output or flow.context not in ("image", "text"):
        raise ConfigError(f"flows=[{flow}]: what is given is of {usual}, or of the variation; name one of these")
    return flow


def _scales(config: EvaluateConfig) -> list[float | None]:
    scales = config.guidance_scales
    # Results are named by six digits.
    if len({f"{scale:g}" for scale in scales}) < len(scales):
        raise ConfigError(f"guidance_scales={scales}: name each scale once")
    return [None] if not scales else [*scales]


def _prompts(config: EvaluateConfig, folder: Path, pictures: Mapping[str, Path]) -> tuple[str, list[tuple[str, str]]]:
    """The file of the prompts, and its rows: of `prompts`, a usual file in the folder, or texts beside the images."""
    file = None if config.prompts is None else Path(config.prompts)
    if file is None:
        file = next((folder / name for name in PROMPT_FILES if (folder / name).is_file()), None)
    if file is not None:
        rows = read_texts(file, "prompts", PROMPTS)
        if not any(name for name, _ in rows):
            if len(rows) != len(pictures):
                raise ConfigError(
                    f"prompts={file}: {len(rows)} lines without names for {len(pictures)} pictures; write NAME, a tab "
                    "and the prompt on each line"
                )
            rows = [(name, text) for name, (_, text) in zip(pictures, rows, strict=True)]
        return f"prompts={file}", rows
    beside = {name: path.with_suffix(".txt") for name, path in pictures.items()}
    if not any(path.is_file() for path in beside.values()):
        raise ConfigError(
            f"prompts=null: {folder} has no {PROMPT_FILES[0]} and no texts beside its pictures; give their file"
        )
    rows = []
    for name, path in beside.items():
        if not path.is_file():
            raise ConfigError(f"prompts=null: {folder / name} has no {path.name} beside it; write its prompt there")
        rows += [(name, " ".join(text for _, text in read_texts(path, "prompts")))]
    return f"images={folder}", rows


def _matched(rows: Sequence[tuple[str, str]], names: Sequence[str], file: str, folder: Path) -> list[int]:
    """For each prompt the number of its image."""
    _refuse_repeated([name for name, _ in rows], file)
    finder = Names(names)
    found = [finder.find(name) for name, _ in rows]
    order = [number for number in found if number is not None]
    if len(order) < len(rows):
        first = next(name for (name, _), number in zip(rows, found, strict=True) if number is None)
        raise ConfigError(
            f"images={folder}: {len(rows) - len(order)} of the {len(rows)} prompts of {file} have no picture, the "
            f"first {first}; make the pictures, or take the prompts out"
        )
    _refuse_repeated([names[number] for number in order], file)
    if extra := sorted(set(range(len(names))) - set(order)):
        raise ConfigError(
            f"images={folder}: {len(extra)} of the {len(names)} pictures have no prompt in {file}, the first "
            f"{names[extra[0]]}; add the prompts, or take the pictures out"
        )
    return order


def _refuse_repeated(names: Sequence[str], place: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not name:
            raise ConfigError(f"{place}: lines without names; write NAME, a tab and the text on each line")
        if name in seen:
            raise ConfigError(f"{place}: names {name} twice; give each once")
        seen.add(name)


def _samples(config: EvaluateConfig, count: int, place: str, what: str) -> int:
    samples = count if config.samples is None else config.samples
    if count < samples:
        raise ConfigError(f"samples={samples}: {place} has {count} {what}; set samples={count}, or add {what}")
    if samples < 2:
        raise ConfigError(f"{place}: has {count} {what}; the figures need at least 2, and FID thousands")
    return samples


def _digest(content: Any) -> str:
    return hashlib.blake2b(repr(content).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
