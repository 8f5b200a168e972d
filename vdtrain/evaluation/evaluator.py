"""An evaluation from settings to metrics: each process makes its share of the parts, and rank 0 reports on all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vdtrain.commands.sampler import DTYPES, SAMPLING, check_sampler
from vdtrain.config.compose import ConfigError
from vdtrain.config.schema import EvaluateConfig
from vdtrain.config.validation import check_sampling
from vdtrain.diffusion.sampling import make_solver, spacing_note
from vdtrain.diffusion.schedule import Schedule
from vdtrain.evaluation.frechet import Statistics, read_reference, write_reference
from vdtrain.evaluation.inception import PUBLISHED, SOURCE, WIDTH, InceptionFeatures
from vdtrain.evaluation.pairs import EvaluatedModel, Pairs
from vdtrain.evaluation.parts import PAIRS, Part, PartContents, Parts
from vdtrain.evaluation.report import log_to_wandb, print_table, write_metrics, write_sheet
from vdtrain.evaluation.scores import (
    CLIP,
    INCEPTION,
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
from vdtrain.extras import missing
from vdtrain.files import FileRecord, check_output, write_text, written_whole
from vdtrain.flows import Flow
from vdtrain.models.frozen_weights import locate
from vdtrain.pipeline import VersatileDiffusion
from vdtrain.progress import Progress

FEW_SAMPLES = 10_000
# Settings that do not change the samples.
FREE = ("batch_size",)


class Evaluator:
    """One process of an evaluation. Settings and files are checked before a model is loaded.

    Raises:
        ConfigError: a setting cannot work, or a file is missing.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        _check(config)
        check_output(Path(config.output_dir), f"output_dir={config.output_dir}")
        self.config = config
        self.evaluated = EvaluatedModel.find(config.checkpoint, config.weights)
        flows = self.evaluated.flows(config.flows)
        check_sampling(config, self.evaluated.model)
        make_solver(config.solver, Schedule(self.evaluated.model.schedule), config.steps, config.eta)
        check_clip(config.clip, self.evaluated.model)
        self.inception_file = _inception_file(config)
        self.reference = _reference(config)
        self.pairs = Pairs(config)
        # Flows that no metric can score are skipped.
        self.flows = [flow for flow in flows if self.wanted(flow)]
        self.skipped = [flow for flow in flows if flow not in self.flows]
        self.parts = Parts(Path(config.output_dir), config.samples, config.part_samples)

    def wanted(self, flow: Flow) -> set[str]:
        """The features of a flow's output that its metrics need."""
        return features_of(flow.output, self.config.fid.weights is not None)

    @cached_property
    def wanted_of_pairs(self) -> set[str]:
        """The features of the real samples that metrics need: "image/clip" and so on."""
        with_inception = self.config.fid.weights is not None and self.reference is None
        return {f"{name}/{each}" for name in ("image", "text") for each in features_of(name, with_inception)}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that the parts depend on."""
        config = self.config
        sampling = {name: getattr(config, name) for name in SAMPLING if name not in FREE}
        return {
            "checkpoint": self.evaluated.sha256,
            "weights": config.weights,
            **sampling,
            "precision": config.precision,
            "resolution": config.resolution,
            "pairs": self.pairs.identity,
            "part_samples": config.part_samples,
            "fid.weights": self.inception_file and self.inception_file.sha256,
            "clip": [config.clip.architecture, config.clip.weights, config.clip.tokenizer],
        }

    def remarks(self) -> list[str]:
        """Warnings for the user, before the long work."""
        config, lines = self.config, []
        if config.fid.weights is None:
            lines.append(f"fid.weights: null, so FID is skipped; fetch {SOURCE} and name the file")
        elif self.inception_file and not self.inception_file.sha256.startswith(PUBLISHED):
            lines.append("fid.weights: not the published file; this FID cannot be compared with published ones")
        if config.samples < FEW_SAMPLES and any(flow.output == "image" for flow in self.flows):
            lines.append(
                f"samples={config.samples}: with fewer than {FEW_SAMPLES:,} samples Fréchet distances are too large; "
                "only compare evaluations with the same number of samples"
            )
        if note := spacing_note(config.solver, Schedule(self.evaluated.model.schedule), config.steps):
            lines.append(note)
        for flow in self.skipped:
            lines.append(f"flows: {flow} is skipped: no metric is known for the modality {flow.output!r}")
        return lines

    def missing(self) -> list[tuple[int, str]]:
        """The (part, flow or "pairs") that are not made yet."""
        wanted = {flow.name: self.wanted(flow) for flow in self.flows} | {PAIRS: self.wanted_of_pairs}
        return self.parts.missing([PAIRS, *(flow.name for flow in self.flows)], wanted)

    def make(self, tasks: list[tuple[int, str]], device: torch.device, is_main: bool) -> None:
        """Make some of the missing parts.

        Args:
            is_main: whether to show the progress.

        Raises:
            ConfigError: weights cannot be loaded, pairs cannot be read, or a part cannot be written.
        """
        flows = {flow.name: flow for flow in self.flows}
        total = sum(len(self.parts.parts[number]) for number, name in tasks if name != PAIRS)
        self._load(str(device), total > 0)
        with Progress("evaluate", total, "samples", silent=not is_main) as progress:
            for number in sorted({number for number, _ in tasks}):
                part = self.parts.parts[number]
                samples = self.pairs.read(part)
                for name in (name for each, name in tasks if each == number):
                    if name == PAIRS:
                        self._measure_pairs(part, samples)
                    else:
                        self._measure_flow(flows[name], part, samples, progress)

    def _load(self, device: str, with_model: bool) -> None:
        config, model = self.config, self.evaluated.model
        scorer = ClipScorer(config.clip, model).to(device)
        inception = InceptionFeatures(config.fid.weights).to(device) if config.fid.weights is not None else None
        self.networks: dict[tuple[str, str], Network] = networks(scorer, inception)
        if with_model:
            self.model = VersatileDiffusion.from_checkpoint(
                str(self.evaluated.path), config.weights, device, DTYPES[config.precision]
            )

    def _measure_pairs(self, part: Part, samples: dict[str, Any]) -> None:
        features = {
            wanted: in_batches(self.networks[modality, feature], samples[modality])
            for wanted in sorted(self.wanted_of_pairs)
            for modality, _, feature in [wanted.partition("/")]
        }
        self.parts.write(part, PAIRS, features, {name: samples[name] for name in ("image", "text") if name in samples})

    def _measure_flow(self, flow: Flow, part: Part, samples: dict[str, Any], progress: Progress) -> None:
        config = self.config
        batch = len(part) / -(-len(part) // config.batch_size)
        settings = {name: getattr(config, name) for name in SAMPLING} | {"seed": config.seed + part.start}
        progress.title = flow.name

        def steps(turns: Sequence[int]) -> Iterator[int]:
            for turn in turns:
                yield turn
                progress.advance(batch / len(turns))

        made = self.model.generate(flow.name, samples[flow.context], progress=steps, **settings)
        features = {
            feature: in_batches(self.networks[flow.output, feature], made) for feature in sorted(self.wanted(flow))
        }
        self.parts.write(part, flow.name, features, {flow.output: made})

    def report(self) -> None:
        """Write the metrics of all parts to standard output and to `output_dir`.

        Raises:
            ConfigError: a part is missing or damaged, or a file cannot be written.
        """
        config, folder = self.config, Path(self.config.output_dir)
        pairs = self.parts.read(PAIRS, self.wanted_of_pairs)
        real = self._real(pairs)
        result: dict[str, Any] = {
            "checkpoint": self.evaluated.described(),
            "samples": config.samples,
            "flows": {},
            "pairs": {},
            "settings": self.settings,
            "manifest": config.data.manifest,
            "fid_reference": config.fid.reference,
        }
        if {f"{name}/{CLIP}" for name in ("image", "text")} <= set(pairs.features):
            score = Mean.of(clip_scores(pairs.features[f"image/{CLIP}"], pairs.features[f"text/{CLIP}"]))
            result["pairs"]["clip_score"] = vars(score)
        sheets = []
        for flow in self.flows:
            kept = self.parts.read(flow.name, self.wanted(flow))
            figures: dict[str, Any] = {"samples": config.samples, **distances(flow, kept.features, real)}
            if (score_of_flow := clip_score(flow, kept.features, pairs.features)) is not None:
                figures["clip_score"] = vars(score_of_flow)
            result["flows"][flow.name] = figures
            if flow.context in pairs.shown and flow.output in kept.shown:
                sheets.append(folder / f"{flow.name}.png")
                write_sheet(sheets[-1], pairs.shown[flow.context], kept.shown[flow.output], flow.name)
            for texts in kept.captions.values():
                with written_whole(folder / f"{flow.name}.txt", f"output_dir={folder}", overwrite=True) as draft:
                    write_text(draft, "".join(f"{' '.join(text.split())}\n" for text in texts))
        written = write_metrics(folder, result)
        print_table(result)
        for path in (written, *sheets):
            print(path)
        log_to_wandb(folder, config.tracking, result, sheets)

    def _real(self, pairs: PartContents) -> dict[str, Statistics]:
        """Statistics of real images by feature. Those of Inception are written to `fid.reference`."""
        real = {}
        for feature in (CLIP, INCEPTION):
            if (features := pairs.features.get(f"image/{feature}")) is not None:
                real[feature] = Statistics.of(features)
        if self.reference is not None:
            real[INCEPTION] = self.reference
        elif INCEPTION in real and self.config.fid.reference is not None:
            write_reference(Path(self.config.fid.reference), real[INCEPTION])
            print(f"fid.reference={self.config.fid.reference}: written, of {self.config.samples:,} images")
        return real


def _check(config: EvaluateConfig) -> None:
    check_sampler(config)
    if (config.height, config.width) != (config.resolution, config.resolution):
        raise ConfigError(
            f"height={config.height}, width={config.width}: real images are cropped to squares of resolution; set "
            "resolution only"
        )
    if (line := missing("matplotlib")) is not None:
        raise ConfigError(f"contact sheets: {line}")


def _inception_file(config: EvaluateConfig) -> FileRecord | None:
    if config.fid.weights is not None:
        return FileRecord.of(locate(config.fid.weights, "fid.weights"))
    if config.fid.reference is not None:
        raise ConfigError(f"fid.reference={config.fid.reference}: needs fid.weights; fetch {SOURCE} and name the file")
    return None


def _reference(config: EvaluateConfig) -> Statistics | None:
    path = None if config.fid.reference is None else Path(config.fid.reference)
    if path is None:
        return None
    if path.exists():
        return read_reference(path, WIDTH)
    check_output(path.parent, f"fid.reference={path}")
    return None
