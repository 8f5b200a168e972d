"""The schema of everything in `conf/`: one dataclass per group, merged strictly, so that an unknown key is an error.

The values stand in `conf/*.yaml`. A default here is for a setting that is the same in every preset. `--help` prints
these texts, and `fields.check_values` checks these choices and bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vdtrain.config.data_schema import DataConfig
from vdtrain.config.fields import FilePath, PartArguments, Prompt, PromptTable, setting

CHECKPOINT = "run folder (its latest checkpoint), checkpoint folder or weights folder"
WEIGHTS = ("ema", "model")
DEVICES = ("cuda", "cpu")


@dataclass
class PhaseConfig:
    """One resolution of a stage, trained for a number of image-text pairs."""

    resolution: int = setting("side of the images in pixels", least=1)
    samples: int = setting("image-text pairs", least=1)


@dataclass
class StageConfig:
    """A stage of the curriculum: single-flow, dual-flow, four-flow."""

    name: str = setting("name of the stage")
    flows: list[str] = setting("flows that are trained, each CONTEXT-to-OUTPUT")
    learning_rate: float = setting("learning rate of AdamW", above=0)
    global_batch_size: int = setting("pairs per optimizer step, over all processes", least=1)
    gradient_scales: dict[str, Any] = setting(
        "factor on the step of each layer group: {global: 0.1, data: {image: 0.1}, context: {image: 1.0}}"
    )
    gradient_scale_mode: str = setting(
        "whether the factor multiplies the learning rate or the gradient", choices=("learning_rate", "gradient")
    )
    phases: list[PhaseConfig] = MISSING
    init_from: FilePath | None = setting(f"{CHECKPOINT} that a new run starts from; null for random weights")
    samples_scale: float = setting(
        "factor on the samples of every phase and on the warm-up; 0.01 is a pilot run of one per cent", 1.0, above=0
    )


@dataclass
class DiffuserConfig:
    """Widths and depths of the diffuser."""

    channels: list[int] = setting("channels of each level; each level after the first halves the latent", least=1)
    blocks_per_level: int = setting("residual blocks of each level", least=1)
    attention_levels: list[int] = setting("levels with attention to the context", least=0)
    heads: int = setting("attention heads", least=1)
    norm_groups: int = setting("groups of each group normalisation", least=1)


@dataclass
class ModalityConfig:
    """The four parts of a modality, each a `_target_` with its arguments."""

    data_layers: PartArguments = setting("class and arguments of the data layers")
    context_layers: PartArguments = setting("class and arguments of the context layers")
    vae: PartArguments = setting("class and arguments of the VAE, with its weights")
    context_encoder: PartArguments = setting("class and arguments of the context encoder, with its weights")


@dataclass
class ScheduleConfig:
    """Noise schedule: betas linear in their square root ("scaled linear")."""

    steps: int = setting("diffusion steps", 1000, least=1)
    beta_start: float = setting("first beta", 0.00085, above=0, below=1)
    beta_end: float = setting("last beta", 0.012, above=0, below=1)


@dataclass
class ModelConfig:
    name: str = setting("name of the model")
    base_weights: FilePath | None = setting("weights folder that stage 1 starts from; null for random weights")
    base_modality: str = setting("modality whose data layers the base weights fill", "image")
    latent_downsampling: int = setting("pixels per latent cell along one side, in the image VAE", 8, least=1)
    diffuser: DiffuserConfig = MISSING
    modalities: dict[str, ModalityConfig] = MISSING
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class RatesConfig:
    """What a GPU and its links reach: `vdtrain plan` predicts times from it, and `vdtrain bench` measures it."""

    tflops: float | None = setting(
        "TFLOP/s of one GPU in encoding, forward and backward; null if not known", None, above=0
    )
    micro_batch_ms: float = setting("least time of a micro-batch in ms, for the launches of its kernels", 0.0, least=0)
    memory: float | None = setting("GB/s that a GPU reads and writes in its memory; null if not known", None, above=0)
    link: float | None = setting("GB/s that a GPU receives from others of its node; null if not known", None, above=0)
    network: float | None = setting("GB/s that a node receives from other nodes; null if not known", None, above=0)
    gpus_per_node: int = setting("GPUs of a node", 8, least=1)


@dataclass
class HardwareConfig:
    name: str = setting("name of the hardware")
    device: str = setting("where the tensors are", choices=DEVICES)
    memory_gb: float | None = setting("memory of one GPU in 10^9 bytes; null if it is not known", above=0)
    precision: str = setting("number format of the computation; weights are kept in fp32", choices=("bf16", "fp32"))
    zero_stage: int = setting("ZeRO stage: partitions nothing, optimizer state, or gradients too", choices=(0, 1, 2))
    exchange: str = setting(
        "who reduces gradients and gathers weights under ZeRO 1: deepspeed by an all-reduce, sharded (our own) by a "
        "reduce-scatter during backward; ZeRO 2 is always DeepSpeed's",
        choices=("deepspeed", "sharded"),
    )
    micro_batch_size: dict[int, int] = setting("pairs per process and forward pass, by resolution", least=1)
    attention: str = setting("implementation of attention", choices=("sdpa", "xformers"))
    activation_checkpointing: str = setting(
        "layers that the backward pass recomputes: none, context layers or all blocks",
        choices=("none", "context", "blocks"),
    )
    compile: str = setting(
        "what Inductor compiles: nothing, every block by itself, or the whole diffuser as one graph",
        choices=("none", "blocks", "whole"),
    )
    channels_last: bool = setting("keep the channels of a pixel together in memory; pays with compiled code on a GPU")
    loader_workers: int = setting("decoding threads of each process", least=1)
    threads: int | None = setting("CPU threads of each process for tensors; null for PyTorch's default", least=1)
    rates: RatesConfig = field(default_factory=RatesConfig)


@dataclass
class TrackingConfig:
    name: str = setting("name of the option")
    mode: str = setting("mode of Weights & Biases", choices=("online", "offline", "disabled"), environment="WANDB_MODE")
    project: str = setting("project in Weights & Biases")
    entity: str | None = setting("user or team in Weights & Biases; null for the default of the account")


@dataclass
class OptimizerConfig:
    """AdamW. Every value here is this project's choice (docs/choices.md)."""

    betas: list[float] = setting("decay of the two moments", least=0, below=1)
    epsilon: float = setting("added to the denominator", above=0)
    weight_decay: float = setting("weight decay", least=0)
    gradient_clip: float = setting("largest norm of the gradient; 0 does not clip", least=0)
    max_bad_steps: int = setting(
        "number of steps in a row, skipped because loss or gradient is not finite, that ends the run", least=1
    )
    warmup_samples: int = setting("samples over which the learning rate rises", least=0)
    learning_rate_scale: float = setting("factor on the stage's learning rate, larger for narrow networks", above=0)


@dataclass
class ObjectiveConfig:
    context_dropout: float = setting(
        "probability of the unconditional context, for classifier-free guidance", least=0, below=1
    )
    flow_weights: dict[str, float] = setting("weight of a flow's loss, by flow; 1 for a flow that is not named")


@dataclass
class EmaConfig:
    """Exponential moving average of the weights, started anew in every phase (docs/choices.md)."""

    enabled: bool = setting("keep an average of the weights")
    length: float = setting(
        "how far it looks back, as a share of the phase so far; 0.5 averages a whole phase alike, 0.1 its last tenth",
        above=0,
        most=0.5,
    )
    decay: float | None = setting("upper limit of the decay; null sets no limit", least=0, below=1)


@dataclass
class CheckpointConfig:
    every_steps: int = setting("steps between checkpoints", least=1)
    keep: int = setting("number of newest checkpoints that stay", least=1)
    keep_every_steps: int | None = setting("checkpoints at multiples of it stay too; null for none", least=1)


@dataclass
class TrainConfig:
    """Root of `conf/train.yaml`."""

    stage: StageConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracking: TrackingConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    objective: ObjectiveConfig = MISSING
    ema: EmaConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    runs_dir: FilePath = setting("folder of all runs")
    run_dir: FilePath = setting("folder of this run")
    seed: int = setting("seed of weights, data order and noise")
    log_every_steps: int = setting("steps between lines of the log", least=1)
    watchdog_seconds: float | None = setting(
        "longest time without a step before a process writes its stack and exits; null waits without limit", least=1
    )
    max_restarts: int = setting("how often a Slurm job requeues itself; 0 never does", least=0)


@dataclass
class PlanConfig(TrainConfig):
    """Root of `conf/plan.yaml`."""

    gpus: int = setting("number of processes, one per GPU", least=1)
    format: str = setting("output for people or for programs", choices=("table", "json"))
    rate: FilePath | None = setting("result of `vdtrain bench`, whose rates replace those of hardware.rates")


@dataclass
class BenchConfig(TrainConfig):
    """Root of `conf/bench.yaml`."""

    resolution: int | None = setting("side of the images in pixels; null for the stage's first phase", least=1)
    warmup_steps: int = setting("steps before the timed ones", least=1)
    timed_steps: int = setting("steps that are timed", least=1)
    micro_batches: int | None = setting(
        "micro-batches of a step, each of hardware.micro_batch_size; null for as many as the stage's batch needs",
        least=1,
    )
    profile: bool = setting("write a Chrome trace of one step beside the output")
    output: FilePath | None = setting("JSON file of the result; null only prints")


@dataclass
class PreflightConfig(TrainConfig):
    """Root of `conf/preflight.yaml`."""

    ranks: int | None = setting(
        "number of processes that will train; null for WORLD_SIZE, else SLURM_NTASKS (1 inside a step of one task), "
        "else 1"
    )


@dataclass
class StatusConfig:
    """Root of `conf/status.yaml`."""

    run_dir: FilePath = setting("folder of a run, or of several runs")
    watch: float | None = setting("seconds between updates, on a terminal; null prints once", above=0)


@dataclass
class SamplingConfig:
    """How a sample is drawn; the values are the released application's."""

    height: int = setting("height of the images in pixels", 512)
    width: int = setting("width of the images in pixels", 512)
    steps: int = setting("steps of the solver: ddim needs about 50, the others about 20", 50)
    guidance_scale: float = setting("strength of classifier-free guidance; 1 is none", 7.5)
    solver: str = setting("solver", "ddim", choices=("ddim", "dpm-solver++", "unipc"))
    eta: float = setting("noise that ddim adds back; 0 is deterministic, 1 adds as much as training", 0.0)
    seed: int = setting("seed of the samples", 0)
    batch_size: int = setting("samples that go through the network together", 8, least=1)


@dataclass
class SamplerConfig(SamplingConfig):
    """What every command that samples has in common: `conf/sampler.yaml`."""

    checkpoint: FilePath = setting(CHECKPOINT)
    weights: str = setting("averaged weights, or weights as trained", choices=WEIGHTS)
    output_dir: FilePath = setting("folder of the results; images keep the settings in their metadata")
    resolution: int = setting("height and width, unless these are given")
    device: str = setting("where the model runs", choices=DEVICES)
    precision: str = setting("number format of the model", choices=("fp32", "bf16", "fp16"))
    threads: int | None = setting("CPU threads for tensors; null for PyTorch's default", least=1)


@dataclass
class SampleConfig(SamplerConfig):
    """Root of `conf/sample.yaml`."""

    flow: str = setting("flow, CONTEXT-to-OUTPUT")
    inputs: list[Prompt] = setting("captions or image files, by the context of the flow")
    samples_per_input: int = setting("samples for each input", least=1)
    focus: float = setting("image contexts: 0 keeps the content, 0.5 changes nothing, 1 keeps the style")
    start_from: list[Prompt] = setting("samples to start from instead of noise, one for each input")
    fidelity: float = setting("how little start_from is noised: 0 starts from noise, 1 keeps it")


@dataclass
class BlendConfig(SamplerConfig):
    """Root of `conf/blend.yaml`."""

    output: str = setting("modality of the samples: image or text")
    contexts: list[PromptTable] = setting(
        "each {text: CAPTION} or {image: FILE}, with an optional weight and, for an image, a mask file"
    )
    samples: int = setting("number of samples", least=1)
    mixing: str = setting(
        "attention averages the contexts in every context layer, layer draws one of them for each",
        choices=("attention", "layer"),
    )
    join: bool = setting("join contexts of one modality token after token; false mixes them one by one")


@dataclass
class EditConfig(SamplerConfig):
    """Root of `conf/edit.yaml`."""

    inputs: list[Prompt] = setting("image files")
    remove: Prompt = setting("words to take out; may be empty")
    add: Prompt = setting("words to put in; may be empty")
    text_share: float = setting("share of the text in the new image; the old image's style has the rest")
    style_rank: int = setting("components of the old image's context that count as its style", least=1)


@dataclass
class WeightsConfig:
    """Root of `conf/weights.yaml`."""

    model: ModelConfig = MISSING
    output: FilePath | None = setting("import: folder of the diffuser; null for the one shown beside the source")
    checkpoint: FilePath = setting(f"export: {CHECKPOINT}")
    weights: str = setting("export: averaged weights, or weights as trained", choices=WEIGHTS)
    precision: str = setting("export: number format of the file", choices=("fp32", "fp16", "bf16", "keep"))
    overwrite: bool = setting("replace existing files")


@dataclass
class DataPipelineConfig:
    """Root of `conf/data_pipeline.yaml`."""

    data: DataConfig = MISSING


@dataclass
class LatentsConfig:
    """Root of `conf/latents.yaml`."""

    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    hardware: HardwareConfig = MISSING


@dataclass
class FidConfig:
    """Fréchet Inception distance."""

    weights: FilePath | None = setting("Inception weights of 2015 (docs/evaluation.md); null leaves FID out")
    reference: FilePath | None = setting(
        "npz file with mean and covariance of the real images: read if it exists, else written; null for neither"
    )


@dataclass
class ClipConfig:
    """The CLIP that scores."""

    architecture: Any = setting("open_clip model, or its description; null for the CLIP of the model's contexts")
    weights: FilePath | None = setting("weights of that CLIP")
    tokenizer: FilePath | None = setting("tokenizer of that CLIP; null for CLIP's own")


@dataclass
class EvaluateConfig(SamplerConfig):
    """Root of `conf/evaluate.yaml`."""

    flows: list[str] = setting("flows that are measured")
    samples: int = setting("pairs of the manifest; each gives every flow one sample", least=2)
    part_samples: int = setting("samples per file; an interruption costs at most one file", least=1)
    loader_workers: int = setting("decoding threads of each process", least=1)
    fid: FidConfig = MISSING
    clip: ClipConfig = MISSING
    data: DataConfig = MISSING
    tracking: TrackingConfig = MISSING
