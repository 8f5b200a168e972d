"""Where trained weights come from, for a model card: the runs behind them, their data, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vdtrain.checkpoint.folder import CHECKPOINTS
from vdtrain.checkpoint.format import Checkpoint
from vdtrain.errors import ConfigError
from vdtrain.evaluation.report import METRICS, cell_of
from vdtrain.files import SHAPE_ERRORS, read_json
from vdtrain.report.curriculum import EVALUATION_FILE, Run, evaluation_folders, read_runs
from vdtrain.training.continuation import recorded_config
from vdtrain.training.start import resolve_weights
from vdtrain.weights.folder import CARD_FILE
from vdtrain.weights.imports import ADDRESSES, FOLDERS

# The hub's name for weights whose licence nobody has chosen.
UNKNOWN = "unknown"
# Sources of the curriculum's data by the names that conf/ gives them, with the repositories that publish the lists.
DATA_SETS = {
    "laion2b_en": "LAION-2B-en (images of the web by their addresses; laion/laion2B-en)",
    "coyo700m": "COYO-700M (images of the web by their addresses; kakaobrain/coyo-700m)",
    "coco2014": "COCO 2014",
    "coco2017": "COCO 2017",
}


@dataclass(frozen=True)
class StageRow:
    """A stage that was trained.

    Attributes:
        samples, steps: trained so far.
        phases: sides of its images in pixels.
        precision: number format of the computation.
        commits: of the code, oldest first.
    """

    name: str
    flows: list[str]
    samples: int
    steps: int
    phases: list[int]
    batch: int
    learning_rate: float
    precision: str
    lora_rank: int | None
    commits: list[str]


@dataclass(frozen=True)
class Origin:
    """What is known of weights.

    Attributes:
        stages: that were trained here, in their order; empty for weights that were imported.
        start: what the first of them started from: a repository of the hub, "random", or "" if that is not known.
        data: name of each data set.
        figures: of evaluations: a title, names of columns, and a row for each flow.
        card: an earlier card of the same weights.
    """

    stages: list[StageRow] = field(default_factory=list)
    start: str = ""
    data: list[str] = field(default_factory=list)
    figures: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    card: str = ""


def origin_of(value: str) -> Origin:
    """What is known of the run folder, checkpoint folder or weights folder `value`, which has been opened before."""
    source = resolve_weights("checkpoint", value)
    if isinstance(source, Path):
        file = source / CARD_FILE
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        return Origin(start=repository_of(value) or _start_by(text), card=text)
    runs = _runs(source)
    configs = [run.config for run in runs[:-1]] + [recorded_config(source.state)]
    found: list[Run | None] = [*runs] or [None]
    stages = [_row(config, run, source) for config, run in zip(configs, found, strict=True)]
    names = [name for config in configs for name in _data(config)]
    return Origin(stages, _start(configs[0]), list(dict.fromkeys(names)), _figures(runs[-1:], source))


def _start_by(card: str) -> str:
    """What an earlier card says that its weights began from."""
    try:
        head = yaml.safe_load(card.split("---")[1])
        return "random" if head["license"] == UNKNOWN else str(head["base_model"][0])
    except (yaml.YAMLError, *SHAPE_ERRORS):
        return ""


def repository_of(value: str) -> str:
    """The hub's repository that a weights folder was imported from by default; "" if it has another name."""
    source = next((name for name, folder in FOLDERS.items() if Path(value) == Path(folder)), None)
    address = ADDRESSES.get(source or "", "")
    return "/".join(address.removeprefix("hf:").partition("@")[0].split("/")[:2])


def _runs(checkpoint: Checkpoint) -> list[Run]:
    """The runs up to a checkpoint's own, which is the last; none if its run folder is not there."""
    folder = checkpoint.path.absolute().parent
    if folder.name != CHECKPOINTS:
        return []
    try:
        return read_runs([folder.parent])
    except (ConfigError, OSError):
        return []


def _row(config: Mapping[str, Any], run: Run | None, last: Checkpoint) -> StageRow:
    """A stage's row, from the configuration and the run's records; the last one ends at the checkpoint."""
    stage, optimizer = config["stage"], config.get("optimizer") or {}
    batch = int(stage["global_batch_size"])
    own = run is None or run.folder == last.path.absolute().parents[1]
    steps = last.index.step if own else run.summary.step if run is not None else 0
    starts = run.summary.starts if run is not None else []
    commits = [str(event.environment["commit"]) for event in starts if event.environment.get("commit")]
    return StageRow(
        name=str(stage["name"]),
        flows=[str(flow) for flow in stage["flows"]],
        samples=steps * batch,
        steps=steps,
        phases=[int(phase["resolution"]) for phase in stage["phases"]],
        batch=batch,
        learning_rate=float(stage["learning_rate"]) * float(optimizer.get("learning_rate_scale") or 1.0),
        precision=str((config.get("hardware") or {}).get("precision", "")),
        lora_rank=(config.get("lora") or {}).get("rank"),
        commits=list(dict.fromkeys(commits)),
    )


def _start(config: Mapping[str, Any]) -> str:
    start = config["stage"].get("init_from")
    return "random" if start is None else repository_of(str(start))


def _data(config: Mapping[str, Any]) -> list[str]:
    """The names of a run's data sets; neither folders nor addresses."""
    data = config.get("data") or {}
    sources = data.get("sources")
    names = list(sources) if isinstance(sources, dict) and sources else [data.get("name")]
    # The demo's drawn images stand under the names of the sets whose form they have.
    if data.get("name") == "shapes":
        names = ["shapes, images that were drawn for the purpose"]
    return [DATA_SETS.get(str(name), str(name)) for name in names if name]


def _figures(runs: Sequence[Run], checkpoint: Checkpoint) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table for each evaluation in the run's folder of this checkpoint."""
    tables = []
    for folder in evaluation_folders(runs, []):
        try:
            result = read_json(folder / EVALUATION_FILE)
            about, flows = result["checkpoint"], dict(result["flows"])
            if about.get("weights") is None or Path(str(about["path"])).name != checkpoint.path.name:
                continue
            shown = [name for name in METRICS if any(figures.get(name) is not None for figures in flows.values())]
            rows = [[flow, *(cell_of(name, figures.get(name)) for name in shown)] for flow, figures in flows.items()]
            weights = "averaged weights" if about["weights"] == "ema" else "weights as trained"
            title = f"{folder.name}: {int(result['samples']):,} samples of each flow, {weights}"
            tables.append((title, [METRICS[name][0] for name in shown], rows))
        except (OSError, *SHAPE_ERRORS):
            continue
    return tables
