"""The schema of everything in `conf/`: one dataclass per group, merged strictly, so that an unknown key is an error.

The values stand in `conf/*.yaml`; a default here is only given to a setting that is the same in every preset.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vdtrain.config.data_schema import DataConfig
from vdtrain.config.overrides import FilePath, PartArguments, Prompt, PromptTable


@dataclass
class PhaseConfig:
    """One resolution of a stage, trained for a number of image-text pairs."""

    resolution: int = MISSING
    samples: int = MISSING


@dataclass
class StageConfig:
    """A stage of the curriculum: single-flow, dual-flow, four-flow."""

    name: str = MISSING
    flows: list[str] = MISSING
    learning_rate: float = MISSING
    global_batch_size: int = MISSING
    # Nested by layer group: {global: 0.1, data: {image: 0.1}, context: {image: 1.0}}.
    gradient_scales: dict[str, Any] = MISSING
    gradient_scale_mode: str = MISSING
    phases: list[PhaseConfig] = MISSING
    # A run folder, a checkpoint folder or a weights folder; null starts from random weights.
    init_from: FilePath | None = MISSING
    # Multiplies the samples of every phase: 0.01 is a pilot run of one per cent.
    samples_scale: float = 1.0


@dataclass
class DiffuserConfig:
    """Widths and depths of the diffuser."""

    channels: list[int] = MISSING  # per level; each level after the first halves the image latent
    blocks_per_level: int = MISSING
    attention_levels: list[int] = MISSING
    heads: int = MISSING
    norm_groups: int = MISSING


@dataclass
class ModalityConfig:
    """The four parts of a modality, each a `_target_` with its arguments."""

    data_layers: PartArguments = MISSING
    context_layers: PartArguments = MISSING
    vae: PartArguments = MISSING
    context_encoder: PartArguments = MISSING


@dataclass
class ScheduleConfig:
    """Noise schedule: betas linear in their square root ("scaled linear")."""

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012


@dataclass
class ModelConfig:
    name: str = MISSING
    # The weights folder that stage 1 starts from; null for random weights.
    base_weights: FilePath | None = MISSING
    # The modality whose data layers the base weights fill.
    base_modality: str = "image"
    # Pixels per latent cell along one side, in the image VAE.
    latent_downsampling: int = 8
    diffuser: DiffuserConfig = MISSING
    modalities: dict[str, ModalityConfig] = MISSING
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class HardwareConfig:
    name: str = MISSING
    device: str = MISSING  # cuda or cpu
    memory_gb: float | None = MISSING  # of one GPU, in 10^9 bytes; null where there is none to fill
    precision: str = MISSING  # bf16 or fp32
    zero_stage: int = MISSING  # 0, 1 or 2
    offload_optimizer: bool = False  # refused, with the reason
    # Pairs per process and forward pass, by resolution.
    micro_batch_size: dict[int, int] = MISSING
    attention: str = MISSING  # sdpa or xformers
    # What the backward pass computes again instead of keeping it: none, context (layers) or blocks (all of them).
    activation_checkpointing: str = MISSING
    loader_workers: int = MISSING
    threads: int | None = MISSING  # CPU threads per process for tensor operations; null leaves PyTorch's choice


@dataclass
class TrackingConfig:
    name: str = MISSING
    mode: str = MISSING  # online, offline or disabled
    project: str = MISSING
    entity: str | None = MISSING


@dataclass
class OptimizerConfig:
    """AdamW. Every value here is this project's choice (docs/choices.md)."""

    betas: list[float] = MISSING
    epsilon: float = MISSING
    weight_decay: float = MISSING
    gradient_clip: float = MISSING  # largest norm; 0 clips nothing
    # As many steps in a row, left out for a loss or a gradient that is not finite, end the run.
    max_bad_steps: int = MISSING
    warmup_samples: int = MISSING
    # Multiplies the stage's learning rate: a narrow network takes larger steps.
    learning_rate_scale: float = MISSING


@dataclass
class ObjectiveConfig:
    # Probability that a sample's context is replaced by the unconditional one, for classifier-free guidance.
    context_dropout: float = MISSING
    # Weight of a flow's loss, by flow name; a flow that is not named weighs 1.
    flow_weights: dict[str, float] = MISSING


@dataclass
class EmaConfig:
    """Average of the weights, started anew in every phase (docs/choices.md)."""

    enabled: bool = MISSING
    length: float = MISSING  # how far it looks back, as a share of the phase so far
    decay: float | None = MISSING  # upper limit of what an update keeps; null for none


@dataclass
class CheckpointConfig:
    every_steps: int = MISSING
    keep: int = MISSING  # the newest ones, however they came about
    keep_every_steps: int | None = MISSING  # beside them, those of a step that is a multiple of it; null for none


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
    runs_dir: FilePath = MISSING
    run_dir: FilePath = MISSING
    seed: int = MISSING
    log_every_steps: int = MISSING
    # Longest time without a step before a process writes down where it stands and ends; null waits for ever.
    watchdog_seconds: float | None = MISSING
    # How often a Slurm job puts itself back into the queue; 0 for never.
    max_restarts: int = MISSING


@dataclass
class PlanConfig(TrainConfig):
    """Root of `conf/plan.yaml`."""

    gpus: int = MISSING
    format: str = MISSING  # table or json


@dataclass
class PreflightConfig(TrainConfig):
    """Root of `conf/preflight.yaml`."""

    # Processes that will train; null for what the launcher says.
    ranks: int | None = MISSING


@dataclass
class StatusConfig:
    """Root of `conf/status.yaml`."""

    run_dir: FilePath = MISSING
    watch: float | None = MISSING  # seconds between looks; null for one look


@dataclass
class SamplingConfig:
    """How a sample is drawn; the values are the released application's."""

    height: int = 512  # of images, in pixels
    width: int = 512
    steps: int = 50
    guidance_scale: float = 7.5  # 1 is no guidance
    solver: str = "ddim"  # ddim, dpm-solver++ or unipc
    eta: float = 0.0  # noise added back by DDIM: 0 none, 1 as much as in training
    seed: int = 0
    batch_size: int = 8  # samples that go through the network together


@dataclass
class SamplerConfig(SamplingConfig):
    """What every command that samples has in common: `conf/sampler.yaml`."""

    checkpoint: FilePath = MISSING
    weights: str = MISSING  # ema or model
    output_dir: FilePath = MISSING
    resolution: int = MISSING  # height and width, where these are not given
    device: str = MISSING
    precision: str = MISSING  # fp32, bf16 or fp16
    threads: int | None = MISSING


@dataclass
class SampleConfig(SamplerConfig):
    """Root of `conf/sample.yaml`."""

    flow: str = MISSING
    inputs: list[Prompt] = MISSING  # captions, or image files, by the flow's context
    samples_per_input: int = MISSING
    focus: float = MISSING
    start_from: list[Prompt] = MISSING
    fidelity: float = MISSING


@dataclass
class BlendConfig(SamplerConfig):
    """Root of `conf/blend.yaml`."""

    output: str = MISSING
    # {text: CAPTION} or {image: FILE}, each with an optional weight and, for images, a mask file.
    contexts: list[PromptTable] = MISSING
    samples: int = MISSING
    mixing: str = MISSING
    join: bool = MISSING


@dataclass
class EditConfig(SamplerConfig):
    """Root of `conf/edit.yaml`."""

    inputs: list[Prompt] = MISSING  # image files
    remove: Prompt = MISSING
    add: Prompt = MISSING
    text_share: float = MISSING
    style_rank: int = MISSING


@dataclass
class WeightsConfig:
    """Root of `conf/weights.yaml`."""

    model: ModelConfig = MISSING  # import: the model that the weights are of
    output: FilePath | None = MISSING
    checkpoint: FilePath = MISSING
    weights: str = MISSING  # ema or model
    precision: str = MISSING  # keep, fp32, fp16 or bf16
    overwrite: bool = MISSING


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

    weights: FilePath | None = MISSING  # of the Inception network of 2015; null leaves FID out
    # Mean and covariance of the real images, an npz file: read where it is, else written there; null for neither.
    reference: FilePath | None = MISSING


@dataclass
class ClipConfig:
    """The CLIP that scores. Where `architecture` is null, it is the one that the checkpoint's contexts come from."""

    architecture: Any = MISSING  # name of an open_clip model, or what its files hold
    weights: FilePath | None = MISSING
    tokenizer: FilePath | None = MISSING  # null is CLIP's own


@dataclass
class EvaluateConfig(SamplerConfig):
    """Root of `conf/evaluate.yaml`."""

    flows: list[str] = MISSING
    samples: int = MISSING  # pairs of the manifest, each giving every flow one sample
    part_samples: int = MISSING  # pairs whose results are one file: what an interruption costs
    loader_workers: int = MISSING
    fid: FidConfig = MISSING
    clip: ClipConfig = MISSING
    data: DataConfig = MISSING
    tracking: TrackingConfig = MISSING
