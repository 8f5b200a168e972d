"""An evaluation from settings to metrics: each process makes its share of the parts, and rank 0 reports on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vdtrain.config.command_schema import EvaluateConfig
from vdtrain.config.compose import ConfigError
from vdtrain.config.fields import shown
from vdtrain.config.validation import check_indexed
from vdtrain.errors import missing
from vdtrain.evaluation.captions import caption_figures
from vdtrain.evaluation.distances import Reference, Statistics, read_reference, write_reference
from vdtrain.evaluation.inception import PUBLISHED, WAYS, WIDTH, InceptionFeatures, find_weights
from vdtrain.evaluation.pairs import Pairs, PictureFolder, RealSamples
from vdtrain.evaluation.parts import (
    CONTEXT,
    NAME,
    PAIRS,
    REAL,
    REFERENCES,
    Part,
    PartContents,
    Parts,
)
from vdtrain.evaluation.report import (
    curve_of,
    log_to_wandb,
    print_table,
    write_curve,
    write_lines,
    write_metrics,
    write_sheet,
)
from vdtrain.evaluation.scores import (
    CLIP,
    INCEPTION,
    MODALITY_FIGURES,
    OWN,
    ClipScorer,
    Mean,
    Network,
    check_clip,
    clip_score,
    clip_scores,
    distances,
    features_of,
    in_batches,
    networks,
)
from vdtrain.evaluation.subjects import Subject, Variant, subject_of
from vdtrain.files import FileRecord, check_output
from vdtrain.progress import Progress

FEW_SAMPLES = 10_000
NETWORK = "fid.weights"
# Modalities that a contact sheet can show.
SHOWN = ("image", "text")


class Evaluator:
    """One process of an evaluation. Settings and files are checked before a model is loaded.

    Raises:
        ConfigError: a setting cannot work, or a file is missing.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        _check(config)
        check_output(Path(config.output_dir), f"output_dir={config.output_dir}")
        self.config = config
        self.subject: Subject = subject_of(config)
        check_clip(config.clip, self.subject.model)
        self.inception, self.reference = _inception(config)
        self.pairs: RealSamples = (
            Pairs(config, self.subject.held_out, [each.flow for each in self.subject.variants])
            if config.real_images is None
            else PictureFolder(config)
        )
        samples, real = self.subject.join(self.pairs)
        # Flows that no metric can score are skipped.
        variants = self.subject.variants
        self.variants = [each for each in variants if features_of(each.flow.output, True)]
        self.skipped = list(dict.fromkeys(each.flow for each in variants if each not in self.variants))
        _check_extras(self.variants)
        folder, size = Path(config.output_dir), config.part_samples
        self.parts = Parts(folder, samples, size, config.keep_images)
        self.real_parts = Parts(folder, real, size, config.keep_images)
        if (
            self.reference is not None
            and self.reference.origin.get(NETWORK, self.origin[NETWORK]) != self.origin[NETWORK]
        ):
            raise ConfigError(f"fid.reference={config.fid.reference}: of other {NETWORK}; remove it to make it anew")

    def wanted(self, variant: Variant) -> set[str]:
        """The features of a flow's output that its metrics need."""
        found = features_of(variant.flow.output, self.inception is not None)
        return found | {CONTEXT} if self.subject.brings_contexts else found

    @cached_property
    def wanted_of_pairs(self) -> set[str]:
        """The features of the real samples that metrics need: "image/clip" and so on."""
        with_inception = self.inception is not None and self.reference is None
        modalities = self.pairs.modalities & {*SHOWN, *MODALITY_FIGURES}
        return {f"{name}/{each}" for name in modalities for each in features_of(name, with_inception)}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that the parts depend on."""
        config = self.config
        given: dict[str, Any] = {} if self.subject.reads_pairs else {"model": config.model.name}
        if config.data.references is not None:
            given["references"] = FileRecord.of(Path(config.data.references)).sha256
        if config.real_images is not None:
            given["real_images"] = self.pairs.identity
        return {
            **self.subject.settings,
            "resolution": config.resolution,
            "pairs": self.pairs.identity,
            "part_samples": config.part_samples,
            NETWORK: self.inception and FileRecord.of(self.inception).sha256,
            "clip": [config.clip.architecture, config.clip.weights, config.clip.tokenizer],
            **given,
        }

    @property
    def origin(self) -> dict[str, Any]:
        """What the statistics of the real images depend on."""
        kept = {name: self.settings[name] for name in ("resolution", "pairs", NETWORK)}
        return {"images": self.real_parts.samples, **kept}

    @property
    def said(self) -> str:
        """One line on what is measured."""
        config = self.config
        flows = ", ".join(each.name for each in self.variants)
        real = config.real_images or config.data.manifest
        parts = [str(self.subject.described()["path"]), flows]
        if self.subject.reads_pairs:
            solver = f"{config.solver} with {config.steps} steps, guidance {shown(config.guidance_scale)}"
            parts += [f"on {config.device} in {config.precision}", f"{config.resolution} pixels", solver]
        parts += [f"seed {config.seed}", f"{self.parts.samples} samples beside {real}", f"into {config.output_dir}"]
        return f"takes: {', '.join(parts)}"

    def remarks(self) -> list[str]:
        """Warnings for the user, before the long work."""
        samples, lines = self.parts.samples, []
        images = any(each.flow.output == "image" for each in self.variants)
        if images and self.inception is None:
            lines.append(f"fid.weights: null, so FID is skipped; {WAYS}")
        elif images and not self.settings[NETWORK].startswith(PUBLISHED):
            lines.append("fid.weights: not the published file; this FID cannot be compared with published ones")
        if images and samples < FEW_SAMPLES:
            lines.append(
                f"samples={samples}: with fewer than {FEW_SAMPLES:,} samples Fréchet distances are too large; "
                "only compare evaluations with the same number of samples"
            )
        lines += [*self._remarks_on_reference(), *self.subject.remarks()]
        if isinstance(self.pairs, Pairs) and self.config.data.validation.share is None and self.pairs.share:
            lines.append(
                f"data.validation.share: {self.pairs.share:g}, as the checkpoint's run held out; 0 takes all pairs of "
                f"{self.config.data.manifest}, which it was trained on"
            )
        for flow in self.skipped:
            lines.append(
                f"flows: {flow} is skipped: no metric is known for the modality {flow.output!r}, and none is registered"
            )
        return lines

    def _remarks_on_reference(self) -> Iterator[str]:
        if self.reference is None:
            return
        place, origin = f"fid.reference={self.config.fid.reference}", self.reference.origin
        if not origin:
            yield (
                f"{place}: does not tell how it was made; FID is right if its images were resized to 299 pixels as by "
                "torch-fidelity, and pytorch-fid resizes in another way"
            )
        if (images := origin.get("images", self.parts.samples)) < self.parts.samples:
            yield f"{place}: of {images:,} images for samples={self.parts.samples}; remove it to make it anew"
        for name, what in (("resolution", "of another resolution"), ("pairs", "of other real images")):
            if origin.get(name, self.origin[name]) != self.origin[name]:
                yield f"{place}: {what} ({origin[name]}, now {self.origin[name]}); remove it to make it anew"

    def missing(self) -> list[tuple[int, str]]:
        """The (part, flow or "pairs") that are not made yet."""
        wanted = {each.name: self.wanted(each) for each in self.variants}
        return [
            *self.real_parts.missing([PAIRS], {PAIRS: self.wanted_of_pairs}),
            *self.parts.missing(list(wanted), wanted),
        ]

    def make(
        self, tasks: list[tuple[int, str]], device: torch.device, heartbeat: Callable[[str], None], is_main: bool
    ) -> None:
        """Make some of the missing parts.

        Args:
            heartbeat: called with what is being done, at every sampling step.
            is_main: whether to show the progress.

        Raises:
            ConfigError: weights cannot be loaded, pairs cannot be read, or a part cannot be written.
        """
        variants = {each.name: each for each in self.variants}
        total = sum(len(self.parts.parts[number]) for number, name in tasks if name != PAIRS)
        heartbeat("loading the model")
        self._load(str(device), total > 0)
        with Progress("evaluate", total, "samples", silent=not is_main) as progress:
            for number in sorted({number for number, _ in tasks}):
                names = [name for each, name in tasks if each == number]
                real: dict[str, Any] = {}
                if PAIRS in names or self.subject.reads_pairs:
                    heartbeat(f"reading part {number}")
                    real = self.pairs.read(self.real_parts.parts[number])
                for name in names:
                    heartbeat(f"{name} of part {number}")
                    if name == PAIRS:
                        self._measure_pairs(self.real_parts.parts[number], real)
                    else:
                        self._measure_flow(variants[name], self.parts.parts[number], real, progress, heartbeat)

    def _load(self, device: str, with_samples: bool) -> None:
        config = self.config
        scorer = ClipScorer(config.clip, self.subject.model).to(device)
        inception = InceptionFeatures(str(self.inception)).to(device) if self.inception is not None else None
        self.networks: dict[tuple[str, str], Network] = networks(scorer, inception)
        if with_samples:
            self.subject.load(device)

    def _measure_pairs(self, part: Part, real: dict[str, Any]) -> None:
        if absent := {wanted.partition("/")[0] for wanted in self.wanted_of_pairs} - real.keys():
            raise ConfigError(f"data.stream: yields no {min(absent)}, which flows need; name a data set that has it")
        features = {
            wanted: in_batches(self.networks[modality, feature], real[modality])
            for wanted in sorted(self.wanted_of_pairs)
            for modality, _, feature in [wanted.partition("/")]
        }
        kept = ("image", "text", NAME, REFERENCES)
        self.real_parts.write(part, PAIRS, features, {name: real[name] for name in kept if name in real})

    def _measure_flow(
        self, variant: Variant, part: Part, real: dict[str, Any], progress: Progress, heartbeat: Callable[[str], None]
    ) -> None:
        output = variant.flow.output
        progress.title = variant.name

        def advance(what: str, share: float) -> None:
            heartbeat(f"{variant.name} of the samples from {part.start} on, {what}")
            progress.advance(share)

        made, context = self.subject.make(variant, part, real, advance)
        wanted = sorted(self.wanted(variant) - {CONTEXT})
        features = {feature: in_batches(self.networks[output, feature], made) for feature in wanted}
        samples = {output: made} if output in SHOWN else {}
        if context is not None:
            features[CONTEXT] = in_batches(self.networks[variant.flow.context, CLIP], context)
            samples[CONTEXT] = context
        if NAME in real:
            samples[NAME] = real[NAME]
        self.parts.write(part, variant.name, features, samples)

    def report(self) -> None:
        """Write the metrics of all parts to standard output and to `output_dir`.

        Raises:
            ConfigError: a part is missing or damaged, or a file cannot be written.
        """
        config, folder = self.config, Path(self.config.output_dir)
        pairs = self.real_parts.read(PAIRS, self.wanted_of_pairs)
        result: dict[str, Any] = {
            "checkpoint": self.subject.described(),
            "samples": self.parts.samples,
            "real_samples": self.real_parts.samples,
            "flows": {},
            "pairs": {},
            "settings": self.settings,
            "manifest": config.data.manifest if config.real_images is None else None,
            "real_images": config.real_images,
            "fid_reference": config.fid.reference,
        }
        if {f"{name}/{CLIP}" for name in ("image", "text")} <= set(pairs.features):
            score = Mean.of(clip_scores(pairs.features[f"image/{CLIP}"], pairs.features[f"text/{CLIP}"]))
            result["pairs"]["clip_score"] = vars(score)
        statistics = self._statistics(pairs)
        sheets = []
        for variant in self.variants:
            kept = self.parts.read(variant.name, self.wanted(variant))
            result["flows"][variant.name] = self._figures(variant, kept, pairs, statistics)
            rows = self._rows(variant, kept, pairs)
            if len(rows) > 1:
                sheets.append(folder / f"{variant.name}.png")
                write_sheet(sheets[-1], rows)
            self._write_lists(variant, kept, pairs)
        result["curve"] = curve_of(result["flows"], [each for each in self.variants if each.scale is not None])
        written = write_metrics(folder, result)
        curves = write_curve(folder, result["curve"]) if result["curve"] else []
        print_table(result)
        for path in (written, *curves, *sheets):
            print(path)
        plots = [path for path in curves if path.suffix == ".png"]
        log_to_wandb(folder, config.tracking, result, [*plots, *sheets])

    def _figures(
        self, variant: Variant, kept: PartContents, pairs: PartContents, statistics: dict[str, Statistics]
    ) -> dict[str, Any]:
        flow = variant.flow
        figures: dict[str, Any] = {"samples": self.parts.samples}
        real = {name.removeprefix("image/"): each for name, each in pairs.features.items() if name.startswith("image/")}
        figures |= distances(flow, kept.features, statistics, real)
        if (score := clip_score(flow, kept.features, pairs.features)) is not None:
            figures["clip_score"] = vars(score)
        own, real_own = MODALITY_FIGURES.get(flow.output), pairs.features.get(f"{flow.output}/{OWN}")
        if own is not None and real_own is not None and self.subject.aligned:
            found = own.figures(kept.features[OWN], real_own)
            figures |= {name: float(value) for name, value in found.items()}
        # Parts of earlier versions have the pairs' own captions alone.
        references = pairs.captions.get(REFERENCES) or [[text] for text in pairs.captions.get("text", [])]
        if flow.output == "text" and references:
            figures |= caption_figures(kept.captions["text"], references)
        return figures

    def _rows(self, variant: Variant, kept: PartContents, pairs: PartContents) -> dict[str, Any]:
        """The rows of the contact sheet, by their labels: what was given, what was made, and the real samples."""
        flow = variant.flow
        given = kept.shown.get(CONTEXT, pairs.shown.get(flow.context))
        rows = {"given": given, variant.name: kept.shown.get(flow.output)}
        if flow.output != flow.context and self.subject.aligned:
            rows["real"] = pairs.shown.get(flow.output)
        if flow.output not in SHOWN:
            return {}
        return {label: samples for label, samples in rows.items() if samples is not None}

    def _write_lists(self, variant: Variant, kept: PartContents, pairs: PartContents) -> None:
        """The generated captions, and the list of the kept images."""
        folder, names = Path(self.config.output_dir), pairs.captions.get(NAME)
        if (texts := kept.captions.get("text")) is not None:
            write_lines(folder / f"{variant.name}.txt", folder, [" ".join(text.split()) for text in texts])
            if names is not None:
                found = [{"file_name": f"{name}.png", "caption": text} for name, text in zip(names, texts, strict=True)]
                write_lines(folder / f"{variant.name}.jsonl", folder, found)
        elif self.config.keep_images and variant.flow.output == "image":
            own, fixed = kept.captions[NAME], {"flow": variant.flow.name}
            prompts = pairs.captions.get("text") or [None] * len(own)
            lines = [
                {"file_name": f"{name}.png", "prompt": prompt, "real": f"../{REAL}/{name}.png", **fixed}
                for name, prompt in dict(zip(own, prompts, strict=True)).items()
            ]
            write_lines(self.parts.images(variant.name) / "prompts.jsonl", folder, lines)

    def _statistics(self, pairs: PartContents) -> dict[str, Statistics]:
        """Statistics of real images by feature. Those of Inception are written to `fid.reference`."""
        real = {}
        for feature in (CLIP, INCEPTION):
            if (features := pairs.features.get(f"image/{feature}")) is not None:
                real[feature] = Statistics.of(features)
        if self.reference is not None:
            real[INCEPTION] = self.reference.statistics
        elif INCEPTION in real and self.config.fid.reference is not None:
            write_reference(Path(self.config.fid.reference), Reference(real[INCEPTION], self.origin))
            print(f"fid.reference={self.config.fid.reference}: written, of {self.real_parts.samples:,} images")
        return real


def _check(config: EvaluateConfig) -> None:
    if config.real_images is None:
        check_indexed(config.data, "evaluation needs for pairs in a fixed order")
    if (config.height, config.width) != (config.resolution, config.resolution):
        raise ConfigError(
            f"height={config.height}, width={config.width}: real images are cropped to squares of resolution; set "
            "resolution only"
        )


def _check_extras(variants: list[Variant]) -> None:
    texts = any(each.flow.output == "text" for each in variants)
    for package in ("matplotlib", *(("nltk", "sacrebleu") if texts else ())):
        if (line := missing(package)) is not None:
            raise ConfigError(f"{'BLEU' if package != 'matplotlib' else 'contact sheets'}: {line}")


def _inception(config: EvaluateConfig) -> tuple[Path | None, Reference | None]:
    """The file of Inception's weights, and the real images' statistics if they exist."""
    path = None if config.fid.reference is None else Path(config.fid.reference)
    if config.fid.weights is None:
        if path is not None:
            raise ConfigError(f"fid.reference={path}: needs fid.weights; {WAYS}")
        return None, None
    weights = find_weights(config.fid.weights)
    if path is None:
        return weights, None
    if path.exists():
        return weights, read_reference(path, WIDTH)
    check_output(path.parent, f"fid.reference={path}")
    return weights, None
