"""Samples of a stage's flows while it trains: the same inputs and seeds every time, shared among all processes.

RUN_DIR/samples/0000064000/text-to-image.png     after 64,000 training samples: what was given above what came out
RUN_DIR/samples/0000064000/text-to-image.json    captions and settings
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdtrain.config.schema import PhaseConfig, TrainConfig
from vdtrain.config.validation import stage_flows
from vdtrain.data.batch import Batch
from vdtrain.data.loading import fixed_pairs
from vdtrain.errors import one_line
from vdtrain.files import atomic_write, write_text
from vdtrain.flows import Flow
from vdtrain.grid import grid
from vdtrain.media import BYTES, read_images
from vdtrain.pipeline import VersatileDiffusion
from vdtrain.run import distributed

FOLDER, DIGITS = "samples", 10
# Modalities that a grid can show.
SHOWN = ("image", "text")
# Samples that go through the network together: twice as many rows under guidance, without activations to keep.
BATCH = 8


@dataclass(frozen=True)
class Drawn:
    """What a flow made.

    Attributes:
        given, made: of its context and output modality: uint8 [n, 3, H, W] or n captions.
    """

    flow: Flow
    given: Any
    made: Any
    names: list[str]


@dataclass(frozen=True)
class Inputs:
    """Samples by modality, with their names; the same on every process."""

    batches: dict[str, Any]
    names: dict[str, list[str]]

    @classmethod
    def of(cls, config: TrainConfig, resolution: int) -> Inputs:
        """The inputs of a stage's flows at one resolution.

        Raises:
            ConfigError, ManifestError, StreamError, OSError: they cannot be read.
        """
        settings, batches, names = config.samples, dict[str, Any](), dict[str, list[str]]()
        wanted = {flow.context for flow in stage_flows(config) if {flow.context, flow.output} <= {*SHOWN}}
        if "text" in wanted and settings.prompts:
            batches["text"] = names["text"] = list(settings.prompts)
        if "image" in wanted and settings.images:
            batches["image"] = read_images(settings.images, (resolution, resolution))
            names["image"] = [Path(image).name for image in settings.images]
        if left := sorted(wanted - batches.keys()):
            pairs, _ = fixed_pairs(config, resolution, settings.count)
            for modality in left:
                if len(pairs.samples.get(modality, ())):
                    captions = dict(zip(_rows(pairs, "text"), pairs.samples.get("text", ()), strict=False))
                    batches[modality] = pairs.samples[modality]
                    names[modality] = [captions.get(row, "") for row in _rows(pairs, modality)]
        return cls(batches, names)

    @classmethod
    def of_pairs(cls, config: TrainConfig, resolution: int) -> Inputs:
        """Both sides of the first held-out pairs, as many as are scored. It raises the same errors."""
        pairs, numbers = fixed_pairs(config, resolution, config.validation.scored)
        # A score compares both sides of a pair.
        both = [row for row in range(len(numbers)) if all(row in _rows(pairs, each) for each in SHOWN)]
        pairs, numbers = pairs.take(torch.tensor(both, dtype=torch.int64)), [numbers[row] for row in both]
        batches = {each: pairs.samples[each] for each in SHOWN if len(pairs.samples.get(each, ()))}
        return cls(batches, {modality: [str(number) for number in numbers] for modality in batches})


def _rows(pairs: Batch, modality: str) -> list[int]:
    """Which pairs have a modality."""
    if modality in pairs.rows:
        return pairs.rows[modality].tolist()
    return list(range(len(pairs))) if modality in pairs.samples else []


def draw(
    config: TrainConfig, model: VersatileDiffusion, inputs: Inputs, resolution: int, beat: Callable[[str], None]
) -> tuple[list[Drawn], str | None]:
    """A sample of every flow that can be shown, from every input; all on every process, and a line on what failed.

    Every process calls this together and makes its share.

    Args:
        beat: called with what is being done, at every step of the solver.
    """
    settings, rank, world = config.samples, distributed.rank(), distributed.world_size()
    flows = [flow for flow in stage_flows(config) if flow.context in inputs.batches and flow.output in SHOWN]
    own: dict[str, tuple[range, Any]] = {}
    failure = None
    for turn, flow in enumerate(flows):
        rows = _share(len(inputs.batches[flow.context]), rank + turn, world)
        if not rows:
            continue

        def steps(turns: Sequence[int], flow: Flow = flow) -> Iterator[int]:
            for turn in turns:
                beat(f"drawing {flow}, step {turn}")
                yield turn

        try:
            own[flow.name] = (
                rows,
                model.generate(
                    flow.name,
                    inputs.batches[flow.context][rows.start : rows.stop],
                    progress=steps,
                    height=resolution,
                    width=resolution,
                    steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                    solver=settings.solver,
                    seed=settings.seed + rows.start,
                    batch_size=BATCH,
                    output_type=BYTES,
                ),
            )
        # A picture must not end a run: one that does not fit into what memory is left is a warning.
        except (RuntimeError, ValueError) as error:
            failure = f"{flow}: {one_line(error)[:200]}"
            break
    if (failed := distributed.first_failure(failure)) is not None:
        return [], failed
    return [
        Drawn(
            flow,
            inputs.batches[flow.context],
            gathered(flow.output, own.get(flow.name), len(inputs.batches[flow.context]), resolution),
            inputs.names[flow.context],
        )
        for flow in flows
    ], None


def _share(count: int, rank: int, world: int) -> range:
    """This rank's rows of a flow; with few rows and many ranks, the next flow has other ranks."""
    rank %= world
    return range(rank * count // world, (rank + 1) * count // world)


def gathered(modality: str, own: tuple[range, Any] | None, count: int, resolution: int) -> Any:
    """The samples of all processes, on every process; every process must call it."""
    if modality == "image":
        images = torch.zeros(count, 3, resolution, resolution, dtype=torch.uint8)
        if own is not None:
            images[own[0].start : own[0].stop] = own[1].cpu()
        return distributed.joined(images)
    parts = distributed.gather_json(None if own is None else [own[0].start, own[1]])
    return [text for _, texts in sorted(part for part in parts if part is not None) for text in texts]


def folder_of(run_dir: Path, samples: int) -> Path:
    """The folder of the grids after so many training samples."""
    return run_dir / FOLDER / f"{samples:0{DIGITS}d}"


def made(run_dir: Path) -> dict[int, Path]:
    """The folders of a run's grids, by training samples."""
    folders = (run_dir / FOLDER).iterdir() if (run_dir / FOLDER).is_dir() else ()
    return {int(each.name): each for each in sorted(folders) if each.is_dir() and each.name.isdecimal()}


def drop_later(run_dir: Path, samples: int) -> None:
    """Remove the grids of steps that a run has lost and will repeat.

    Raises:
        OSError: they cannot be removed.
    """
    for number, folder in made(run_dir).items():
        if number > samples:
            shutil.rmtree(folder)


def write(
    config: TrainConfig,
    run_dir: Path,
    drawn: Sequence[Drawn],
    samples: int,
    phase: PhaseConfig,
    about: Mapping[str, Any],
) -> dict[str, Path]:
    """Write the grids of all flows, whole or not at all; the files by flow.

    Raises:
        OSError: they cannot be written.
    """
    folder, settings = folder_of(run_dir, samples), config.samples
    sampling = {name: getattr(settings, name) for name in ("steps", "guidance_scale", "solver", "seed")}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder) as draft:
        draft.mkdir()
        for each in drawn:
            weights = "averaged weights" if config.ema.enabled else "weights as trained"
            trained = f"{config.stage.name}, {phase.resolution} px, {weights}"
            title = f"{each.flow} after {samples:,} training samples ({trained})"
            grid(title, [("given", each.given), ("made", each.made)]).save(draft / f"{each.flow}.png", "PNG")
            found = {
                "flow": each.flow.name,
                "samples": samples,
                "stage": config.stage.name,
                "resolution": phase.resolution,
                "weights": "ema" if config.ema.enabled else "model",
                **sampling,
                "given": each.names,
                "made": None if isinstance(each.made, Tensor) else list(each.made),
                **about,
            }
            write_text(draft / f"{each.flow}.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return {each.flow.name: folder / f"{each.flow}.png" for each in drawn}
