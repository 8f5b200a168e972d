"""The model card of an export: README.md with a head that the Hugging Face hub reads.

The head's keys are those of https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from vdtrain.config.schema import ModelConfig
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import layer_group
from vdtrain.weights.origin import UNKNOWN, Origin

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
    rows = [
        [
            each.name,
            ", ".join(each.flows),
            ", then ".join(map(str, dict.fromkeys(each.phases))),
            f"{each.samples:,}",
            f"{each.steps:,} of {each.batch:,}",
            f"{each.learning_rate:g}",
            each.precision + ("" if each.lora_rank is None else f", adapters of rank {each.lora_rank}"),
            ", ".join(commit[:12] for commit in each.commits) or "not known",
        ]
        for each in origin.stages
    ]
    names = ["stage", "flows", "pixels", "pairs", "steps", "learning rate", "precision", "commit of the code"]
    data = "".join(f"* {name}\n" for name in origin.data) or "* not recorded\n"
    return f"Start: {start}\n\nData:\n\n{data}\n{_table(names, rows)}"


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
