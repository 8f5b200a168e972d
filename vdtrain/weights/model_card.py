"""The model card of an export: README.md with a head that the Hugging Face hub reads.

The card tells where the weights come from: the runs behind them, their data, and what was measured. The head's keys are
those of https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vdtrain.checkpoint.folder import CHECKPOINTS
from vdtrain.checkpoint.format import Checkpoint
from vdtrain.config.schema import ModelConfig
from vdtrain.errors import ConfigError
from vdtrain.evaluation.report import METRICS, cell_of
from vdtrain.files import SHAPE_ERRORS, read_json
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import layer_group
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


# Of the table of stages.
COLUMNS = ("stage", "flows", "pixels", "pairs", "steps", "learning rate", "precision", "commit of the code")


@dataclass(frozen=True)
class Origin:
    """What is known of weights.

    Attributes:
        stages: rows of `COLUMNS` of those that were trained here, in their order; empty for weights that were imported.
        start: what the first of them started from: a repository of the hub, "random", or "" if that is not known.
        data: name of each data set.
        figures: of evaluations: a title, names of columns, and a row for each flow.
        card: an earlier card of the same weights.
    """

    stages: list[list[str]] = field(default_factory=list)
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
    return Origin(stages, _start(configs[0]), list(dict.fromkeys(names)), _measured(runs[-1:], source))


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


def _row(config: Mapping[str, Any], run: Run | None, last: Checkpoint) -> list[str]:
    """A stage's row, from the configuration and the run's records; the last one ends at the checkpoint."""
    stage, optimizer = config["stage"], config.get("optimizer") or {}
    batch = int(stage["global_batch_size"])
    own = run is None or run.folder == last.path.absolute().parents[1]
    steps = last.index.step if own else run.summary.step if run is not None else 0
    starts = run.summary.starts if run is not None else []
    commits = [str(event.environment["commit"]) for event in starts if event.environment.get("commit")]
    rate = float(stage["learning_rate"]) * float(optimizer.get("learning_rate_scale") or 1.0)
    rank = (config.get("lora") or {}).get("rank")
    return [
        str(stage["name"]),
        ", ".join(map(str, stage["flows"])),
        ", then ".join(dict.fromkeys(str(int(phase["resolution"])) for phase in stage["phases"])),
        f"{steps * batch:,}",
        f"{steps:,} of {batch:,}",
        f"{rate:g}",
        str((config.get("hardware") or {}).get("precision", "")) + (f", adapters of rank {rank}" if rank else ""),
        ", ".join(commit[:12] for commit in dict.fromkeys(commits)) or "not known",
    ]


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


def _measured(runs: Sequence[Run], checkpoint: Checkpoint) -> list[tuple[str, list[str], list[list[str]]]]:
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


OPENRAIL = "creativeml-openrail-m"
OPENRAIL_TEXT = "https://huggingface.co/spaces/CompVis/stable-diffusion-license"
# What a flow is at the hub, the first that the model has first.
TASKS = {"text-to-image": "text-to-image", "image-to-image": "image-to-image", "image-to-text": "image-to-text"}
PURPOSES = {
    "text-to-image": "an image from a caption",
    "image-to-image": "variations of an image",
    "image-to-text": "a caption of an image",
    "text-to-text": "variations of a caption",
}
# Sections that an export of exported weights takes over from the card that it finds.
KEPT = ("Training", "Figures")


def card(
    layout: str, name: str, names: Iterable[str], model: ModelConfig, origin: Origin, license: str | None = None
) -> str:
    """The text of a card.

    Args:
        layout: format of the export.
        name: of the exported file or folder.
        names: of the diffuser's tensors, by our names.
        license: the hub's name of a licence that the user chose; None for that of the weights that it began from.
    """
    groups = {layer_group(each) for each in names}
    flows = [flow.name for flow in all_flows(model.modalities) if groups.issuperset(active_groups([flow]))]
    published = origin.start != "random" or (layout == "diffusers" and _has_published_parts(model))
    head: dict[str, Any] = {
        "license": license or (OPENRAIL if published else UNKNOWN),
        "library_name": "diffusers" if layout == "diffusers" else "vdtrain",
        "pipeline_tag": next((task for flow, task in TASKS.items() if flow in flows), "text-to-image"),
        "tags": ["versatile-diffusion", *flows, *(["stable-diffusion"] if published else [])],
        "language": ["en"],
    }
    if "/" in origin.start:
        head["base_model"] = [origin.start]
    head_text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    uses = "".join(f"* `{flow}`: {PURPOSES.get(flow, 'samples of one modality from another')}\n" for flow in flows)
    sections = {
        "Use": _use(layout, name, flows),
        "Training": _training(origin),
        "Figures": _figures(origin),
        "Licence": _licence(layout, published, head["license"]),
    }
    sections |= {title: kept for title in KEPT if (kept := _section(origin.card, title))}
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items() if text)
    title = re.sub(r"[^\w. -]", "_", Path(name).stem if layout == "versatile_diffusion" else name)
    return (
        f"---\n{head_text}---\n\n# {title}\n\nA diffusion model of text and images, one network for all of its flows: "
        f"[Versatile Diffusion](https://arxiv.org/abs/2211.08332), trained and exported with vdtrain.\n\n{uses}\n{body}"
    )


def _has_published_parts(model: ModelConfig) -> bool:
    """Whether a frozen part has weights of its own, and not those that come with this package."""
    parts = [part for each in model.modalities.values() for part in (each.vae, each.context_encoder)]
    return any(not str(part["weights"]).startswith("asset:") for part in parts if part.get("weights"))


def _section(text: str, title: str) -> str:
    """A section of an earlier card."""
    found = re.search(rf"^## {title}\n\n(.*?)\n*(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def _use(layout: str, name: str, flows: Sequence[str]) -> str:
    if layout == "diffusers":
        return (
            "```python\nimport torch\nfrom diffusers import VersatileDiffusionPipeline\n\n"
            f'pipeline = VersatileDiffusionPipeline.from_pretrained("{name}", torch_dtype=torch.float16).to("cuda")\n'
            'pipeline.text_to_image("a lighthouse at dusk, in oil").images[0].save("lighthouse.png")\n```\n\n'
            "Put the name of the repository in place of the folder. The pipeline makes images. The layers that make "
            "captions are in `text_unet`; the text VAE behind them is not part of the folder."
        )
    flow = next((each for each in ("text-to-image", "text-to-text") if each in flows), "")
    given = '"a lighthouse at dusk, in oil"' if flow else "image.png"
    flow = flow or next(iter(flows), "text-to-image")
    sample = f"vdtrain sample {{}} {given}" + ("" if flow == "text-to-image" else f" flow={flow}")
    frozen = (
        "The folder has the trained diffuser alone. `vdtrain weights import` fetches the VAEs, CLIP and the "
        "tokenizers that the model's configuration names; docs/weights.md of vdtrain has the commands."
    )
    if layout == "versatile_diffusion":
        folder = f"weights/{Path(name).stem}"
        return (
            f"The file has the names of the release `vd-four-flow-v1-0.pth`, so that the released code reads it. "
            f"vdtrain reads it too:\n\n```sh\nvdtrain weights import versatile_diffusion {name} output={folder}\n"
            f"{sample.format(folder)}\n```\n\n{frozen.replace('The folder', 'The file')}"
        )
    return (
        f"```sh\nhf download NAMESPACE/NAME --local-dir {name}   # from the hub\n{sample.format(name)}\n```\n\n"
        f"From Python:\n\n```python\nfrom vdtrain.pipeline import VersatileDiffusion\n\n"
        f'model = VersatileDiffusion.from_checkpoint("{name}")\n```\n\n{frozen} The tensors are safetensors under the '
        "names of the 2023 release and can be read without vdtrain."
    )


def _training(origin: Origin) -> str:
    start = {"random": "Random weights.", "": "Weights that are not recorded."}.get(
        origin.start, f"[{origin.start}](https://huggingface.co/{origin.start})."
    )
    if not origin.stages:
        return f"The weights were imported, and not trained further here. They come from: {start}"
    data = "".join(f"* {name}\n" for name in origin.data) or "* not recorded\n"
    return f"Start: {start}\n\nData:\n\n{data}\n{_table(COLUMNS, origin.stages)}"


def _figures(origin: Origin) -> str:
    return "\n\n".join(f"{title}.\n\n{_table(['flow', *names], rows)}" for title, names, rows in origin.figures)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _licence(layout: str, published: bool, license: str) -> str:
    if not published:
        return (
            f"`{license}`. The weights began at random, and no published weights are in them. Their owner chooses the "
            "licence."
        )
    lines = [
        f"The weights derive from Stable Diffusion v1, under the [CreativeML OpenRAIL-M licence]({OPENRAIL_TEXT}). It "
        "passes on: all who receive these weights receive them under its restrictions of use (its Attachment A), with "
        "a copy of the licence. A licence of your own must include these restrictions.",
        "The text VAE, Optimus, is published under the MIT licence. Its networks began as BERT (Apache 2.0) and GPT-2 "
        "(modified MIT). CLIP is published by OpenAI under the MIT licence; its own model card advises against use in "
        "products without a study of them.",
    ]
    if layout == "diffusers":
        lines.append("This folder contains Stable Diffusion's image VAE and CLIP, unchanged.")
    else:
        lines.append("None of these frozen parts is in this export.")
    lines.append("Images and captions of the web have the prejudices of the web, and the samples show them.")
    return "\n\n".join(lines)
