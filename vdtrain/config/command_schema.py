"""The schemas of the commands beside training: what sampling, evaluation, weights, reports and data take.

A command's own class has the settings of `conf/COMMAND.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from vdtrain.config.data_schema import DataConfig
from vdtrain.config.fields import FilePath, Prompt, PromptTable, setting
from vdtrain.config.schema import (
    CHECKPOINT,
    DEVICES,
    WATCHDOG,
    HardwareConfig,
    ModelConfig,
    ProcessesConfig,
    TrackingConfig,
)

WEIGHTS = ("ema", "model")
TRUST = "modules whose classes a checkpoint may name beside this package's own; calling them can run anything"
AUTO = "auto"


@dataclass
class StatusConfig:
    run_dir: FilePath = setting("folder of a run, or of several runs")
    watch: float | None = setting("seconds between updates, on a terminal; null prints once", above=0)


@dataclass
class ReportConfig:
    run_dirs: list[FilePath] = setting(
        "run of the last stage, or the folder of a curriculum's runs, or all its runs in their order"
    )
    output: FilePath | None = setting("HTML file; null for report.html in the last of these folders")
    overwrite: bool = setting("replace a file that is no page of vdtrain report", False)
    evaluations: list[FilePath] = setting("folders of `vdtrain evaluate` beside those in the run folders")
    image_megabytes: float = setting("most that the page's images take, in 10^6 bytes", above=0)


@dataclass
class CompareConfig:
    a: FilePath | None = setting("folder of samples that `vdtrain sample` or `vdtrain evaluate` wrote")
    b: FilePath | None = setting("folder of samples from the same inputs")
    pairs: int | None = setting("most pairs of the page, drawn from those that match; null for all", least=1)
    seed: int = setting("seed of the choice of pairs, their order and their sides")
    inputs: FilePath = setting("folder of the images that the samples of flows from images were made from")
    votes: list[FilePath] = setting("files that the page saved; with any, the result is printed")
    output: FilePath | None = setting(
        "HTML file of the page; with votes JSON file of the result; null for comparison.html, and to print alone"
    )
    overwrite: bool = setting("replace an existing file", False)


@dataclass
class SolvingConfig:
    """How noise becomes a sample; the values are the released application's."""

    steps: int = setting("steps of the solver: ddim needs about 50, the others about 20", 50)
    guidance_scale: float = setting("strength of classifier-free guidance; 1 is none", 7.5)
    solver: str = setting("solver", "ddim", choices=("ddim", "dpm-solver++", "unipc"))
    eta: float = setting("noise that ddim adds back; 0 is deterministic, 1 adds as much as training", 0.0)
    seed: int = setting("seed of the samples", 0)
    batch_size: int = setting("samples that go through the network together", 8, least=1)


@dataclass
class SamplingConfig(SolvingConfig):
    """How a sample is drawn."""

    height: int = setting("height of the images in pixels", 512)
    width: int = setting("width of the images in pixels", 512)


@dataclass
class SamplerConfig(SolvingConfig):
    """What every command that samples has in common: `conf/sampler.yaml`."""

    height: int | None = setting("height of the images in pixels; null for the model's own")
    width: int | None = setting("width of the images in pixels; null for the model's own")
    checkpoint: FilePath = setting(CHECKPOINT)
    trust: list[str] = setting(TRUST)
    weights: str = setting("averaged weights, or weights as trained", choices=WEIGHTS)
    output_dir: FilePath = setting("folder of the results; images keep the settings in their metadata")
    resolution: int | None = setting("height and width, unless these are given; null for the model's own")
    device: str = setting("where the model runs; auto is cuda if PyTorch finds a GPU", choices=(AUTO, *DEVICES))
    precision: str = setting(
        "number format of the model; auto is fp16 on a GPU that computes in it fast, else fp32",
        choices=(AUTO, "fp32", "bf16", "fp16"),
    )
    threads: int | None = setting("CPU threads for tensors; null for PyTorch's default", least=1)


@dataclass
class OutputConfig:
    """Of commands whose samples go into a folder that may hold others."""

    overwrite: bool = setting("number the samples from 0 and replace earlier ones; false numbers on", False)
    literal: bool = setting("take a caption that looks like the name of a file as it is", False)


@dataclass
class SampleConfig(SamplerConfig, OutputConfig):
    flow: str = setting("flow, CONTEXT-to-OUTPUT")
    inputs: list[Prompt] = setting("captions or image files, by the context of the flow")
    samples_per_input: int = setting("samples for each input", least=1)
    focus: float = setting("image contexts: 0 keeps the content, 0.5 changes nothing, 1 keeps the style")
    start_from: list[Prompt] = setting("samples to start from instead of noise, one for each input")
    fidelity: float = setting("how little start_from is noised: 0 starts from noise, 1 keeps it")


@dataclass
class BlendConfig(SamplerConfig, OutputConfig):
    output: str = setting("modality of the samples: image or text")
    contexts: list[PromptTable] = setting(
        "each {text: CAPTION} or {image: FILE}, with an optional weight and, for an image, a mask file and a focus"
    )
    samples: int = setting("number of samples", least=1)
    mixing: str = setting(
        "attention averages the contexts in every context layer, layer draws one of them for each",
        choices=("attention", "layer"),
    )
    join: bool = setting("join contexts of one modality token after token; false mixes them one by one")


@dataclass
class EditConfig(SamplerConfig, OutputConfig):
    inputs: list[Prompt] = setting("image files")
    remove: Prompt = setting("words to take out; may be empty")
    add: Prompt = setting("words to put in; may be empty")
    text_share: float = setting("share of the text in the new image; the old image's style has the rest")
    style_rank: int = setting("components of the old image's context that count as its style", least=1)


@dataclass
class AppConfig(SamplerConfig):
    """Root of `conf/app.yaml`; what a sample is drawn with stands in the page at first."""

    host: str = setting("address that the page is served on; 127.0.0.1 for this machine alone")
    port: int = setting("port that the page is served on; 0 for any that is free", least=0, most=65535)


@dataclass
class WeightsConfig:
    model: ModelConfig = MISSING
    output: FilePath | None = setting("import: folder of the diffuser; null for the one shown beside the source")
    checkpoint: FilePath = setting(f"export: {CHECKPOINT}")
    trust: list[str] = setting(f"export: {TRUST}")
    weights: str = setting("export: averaged weights, or weights as trained", choices=WEIGHTS)
    precision: str = setting("export: number format of the file", choices=("fp32", "fp16", "bf16", "keep"))
    overwrite: bool = setting("replace existing files")
    license: str | None = setting(
        "export: the hub's name of the model card's licence; null for that of the weights that the run began from"
    )
    repo: str | None = setting("push: repository of the Hugging Face hub, NAMESPACE/NAME; made if it is not there")
    private: bool = setting("push: make the repository private")
    dry_run: bool = setting("push: list what would be sent, and send nothing")


@dataclass
class DataPipelineConfig:
    data: DataConfig = MISSING


@dataclass
class LatentsConfig(ProcessesConfig):
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    hardware: HardwareConfig = MISSING
    watchdog_seconds: float | None = setting(WATCHDOG, least=1)


@dataclass
class FidConfig:
    """Fréchet Inception distance."""

    weights: FilePath | None = setting(
        "Inception weights of 2015: a file, hf:ORG/REPO/FILE@COMMIT, or hub for torch.hub's copy; null leaves FID out"
    )
    reference: FilePath | None = setting(
        "npz file with mean and covariance of the real images: read if it exists, else written; null for neither"
    )


@dataclass
class ClipConfig:
    """The CLIP that scores."""

    architecture: Any = setting(
        "open_clip model, or its description; null for the CLIP of the checkpoint's contexts, or of model's"
    )
    weights: FilePath | None = setting("weights of that CLIP")
    tokenizer: FilePath | None = setting("tokenizer of that CLIP; null for CLIP's own")


@dataclass
class EvaluateConfig(SamplerConfig, ProcessesConfig):
    images: FilePath | None = setting("folder of generated images, measured in place of a checkpoint's; null for none")
    prompts: FilePath | None = setting("file of their prompts by name; null for the one in the folder")
    captions: FilePath | None = setting("file of generated captions by name, measured in place of a checkpoint's")
    real_images: FilePath | None = setting("folder of real images, in place of the pairs of data.manifest")
    seed: int = setting("seed of the samples, and of the choice of pairs", 0, least=0)
    flows: list[str] = setting("flows that are measured; of images or captions that are given, the one they are of")
    guidance_scales: list[float] = setting("scales that are measured one by one; [] for guidance_scale alone")
    samples: int | None = setting(
        "pairs that are measured, each by a sample of every flow; null for 30,000, or for all images or captions given",
        least=2,
    )
    keep_images: bool = setting("keep the generated and the real images below output_dir/images")
    part_samples: int = setting("samples per file; an interruption costs at most one file", least=1)
    loader_workers: int = setting("decoding threads of each process", least=1)
    watchdog_seconds: float | None = setting(WATCHDOG, least=1)
    fid: FidConfig = MISSING
    clip: ClipConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    tracking: TrackingConfig = MISSING
