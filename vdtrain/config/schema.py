"""The schema of everything in `conf/`: one dataclass per group, merged strictly, so that an unknown key is an error.

A command's own class has the settings of `conf/COMMAND.yaml`, and the values stand there. A default here is for a
setting that is the same in every preset. `--help` prints these texts, and `fields.check_values` checks these choices
and bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vdtrain.config.data_schema import DataConfig
from vdtrain.config.fields import FilePath, PartArguments, Prompt, setting

WATCHDOG = "longest time without a step before a process writes its stack and exits; null waits without limit"

CHECKPOINT = "run folder (its latest checkpoint), checkpoint folder, weights folder or the package's own tiny"
DEVICES = ("cuda", "cpu")
CONSTANT, LINEAR, COSINE = SCHEDULES = ("constant", "linear", "cosine")


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
        "factor on the step of each layer group: {global: 0.1, data: {image: 0.1}, context: {image: 1.0}}; 0 freezes it"
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
    resolution: int = setting("side in pixels of the images that it makes unless told otherwise", 512, least=1)
    diffuser: DiffuserConfig = MISSING
    modalities: dict[str, ModalityConfig] = MISSING
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class RatesConfig:
    """What a GPU and its links reach: `vdtrain plan` predicts times from it, and `vdtrain bench` measures it."""

    tflops: float | None = setting(
        "TFLOP/s of one GPU in encoding, forward and backward; null if not known", None, above=0
    )
    peak_tflops: float | None = setting(
        "TFLOP/s of the data sheet, without sparsity, to compare with; null if not known", None, above=0
    )
    micro_batch_ms: float = setting("least time of a micro-batch in ms, for the launches of its kernels", 0.0, least=0)
    memory: float | None = setting("GB/s that a GPU reads and writes in its memory; null if not known", None, above=0)
    link: float | None = setting("GB/s that a GPU receives from others of its node; null if not known", None, above=0)
    network: float | None = setting("GB/s that a node receives from other nodes; null if not known", None, above=0)
    gpus_per_node: int = setting("GPUs of a node", 8, least=1)


# How weights and gradients are kept and exchanged.
REPLICATED, SHARDED, DEEPSPEED = "replicated", "sharded", "deepspeed"


def strategy_kind(zero_stage: int, exchange: str, world_size: int) -> str:
    """REPLICATED, SHARDED or DEEPSPEED, by the settings of the hardware and the number of processes.

    ZeRO partitions between processes, so a single one has nothing to partition. ZeRO 2 is always DeepSpeed's.
    """
    if zero_stage == 0 or world_size == 1:
        return REPLICATED
    return SHARDED if zero_stage == 1 and exchange == SHARDED else DEEPSPEED


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
        choices=(DEEPSPEED, SHARDED),
    )
    micro_batch_size: dict[int, int] = setting("pairs per process and forward pass, by resolution", least=1)
    attention: str = setting(
        "implementation of attention; few queries read tokens by plain products with both", choices=("sdpa", "xformers")
    )
    activation_checkpointing: str = setting(
        "layers that the backward pass recomputes: none, context layers or all blocks",
        choices=("none", "context", "blocks"),
    )
    compile: str = setting(
        "what Inductor compiles: nothing, every block by itself, or the whole diffuser as one graph",
        choices=("none", "blocks", "whole"),
    )
    channels_last: bool = setting(
        "keep the channels of a pixel together in memory, in states and convolutions; pays with compiled code on a GPU"
    )
    cuda_graphs: bool = setting(
        "replay each micro-batch's forward and backward pass as CUDA graphs, for hosts that launch kernels too slowly"
    )
    loader_workers: int = setting("decoding threads of each process", least=1)
    threads: int | None = setting("CPU threads of each process for tensors; null for PyTorch's default", least=1)
    rates: RatesConfig = field(default_factory=RatesConfig)


@dataclass
class TrackingConfig:
    name: str | None = setting("name of the run in Weights & Biases; null for that of its folder")
    mode: str = setting("mode of Weights & Biases", choices=("online", "offline", "disabled"), environment="WANDB_MODE")
    project: str = setting("project in Weights & Biases")
    entity: str | None = setting("user or team in Weights & Biases; null for the default of the account")
    group: str | None = setting(
        "group of the run in Weights & Biases; null for that of the run that it starts from, or a new one", None
    )
    tags: list[str] = setting("tags of the run in Weights & Biases", factory=list)
    notes: str | None = setting("notes on the run in Weights & Biases", None)
    job_type: str | None = setting("kind of run in Weights & Biases; null for train, or evaluate", None)
    tensorboard: bool = setting("write the same figures for TensorBoard into RUN_DIR/tensorboard", False)


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
    schedule: str = setting(
        "learning rate after the warm-up: constant, or falling until the stage's last step",
        "constant",
        choices=SCHEDULES,
    )
    final_share: float = setting(
        "share of the learning rate that the last step has, under linear and cosine", 0.0, least=0, most=1
    )


@dataclass
class LoraConfig:
    """Low-rank adapters beside weights that stay (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int | None = setting("rank of the adapters; null trains the weights themselves", None, least=1)
    alpha: float | None = setting("the adapters are multiplied by alpha / rank; null for the rank", None, above=0)
    groups: list[str] = setting(
        "layer groups that get adapters, and the others are frozen; empty for all that the stage trains", factory=list
    )
    targets: list[str] = setting(
        "layers that get adapters, by a part of their names, such as attn2 or to_q; empty for every linear layer and "
        "convolution",
        factory=list,
    )


@dataclass
class ObjectiveConfig:
    context_dropout: float = setting(
        "probability of the unconditional context, for classifier-free guidance", least=0, below=1
    )
    flow_weights: dict[str, float] = setting(
        "weight of a flow's loss, by flow; 1 for a flow that is not named", least=0
    )
    min_snr_gamma: float | None = setting(
        "largest signal-to-noise ratio whose timesteps count in full (Hang et al. 2023); 5 is usual, null counts all "
        "alike",
        None,
        above=0,
    )
    offset_noise: float = setting(
        "strength of a noise that shifts a whole channel of an image's latent (0.1 is usual); 0 adds none", 0.0, least=0
    )


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


TIME_SHARE = "largest share of the run's time so far that may go into them, beside the start and ends; null sets none"


@dataclass
class SamplesConfig:
    """Samples of every flow from the same inputs, while training: grids in the run folder and in the tracker."""

    every: int | None = setting(
        "training samples between two grids; null or 0 for none. There is one at the start and at each phase's end too",
        least=0,
    )
    time_share: float | None = setting(TIME_SHARE, above=0, most=1)
    prompts: list[Prompt] = setting("captions for the flows from text; none for those of held-out pairs")
    images: list[FilePath] = setting("image files for the flows from images; none for those of held-out pairs")
    count: int = setting("pairs to take where nothing else is given; the data's first if none is held out", least=1)
    steps: int = setting("steps of the solver", least=1)
    guidance_scale: float = setting("strength of classifier-free guidance; 1 is none")
    solver: str = setting("solver", choices=("ddim", "dpm-solver++", "unipc"))
    seed: int = setting("seed of the samples")


@dataclass
class ValidationConfig:
    """Losses on held-out pairs (data.validation.share), with fixed noise and timesteps."""

    every: int | None = setting(
        "training samples between two validations; null or 0 for none. There is one at the start and at each phase's "
        "end too",
        least=0,
    )
    time_share: float | None = setting(TIME_SHARE, above=0, most=1)
    pairs: int = setting("held-out pairs, each at four timesteps", least=1)
    scored: int = setting("held-out pairs from which every flow makes a sample for CLIP scores; 0 for none", least=0)
    fid_weights: FilePath | None = setting("Inception weights for the FID of these samples; null leaves FID out")


@dataclass
class ProcessesConfig:
    """The processes that a command starts itself, where neither torchrun nor srun starts them."""

    gpus: int | None = setting(
        "processes that the command starts on this node, one on each GPU, or so many on the CPU; null for one",
        None,
        least=1,
    )
    nnodes: int = setting("nodes, on each of which the same command is typed", 1, least=1)
    node_rank: int | None = setting(
        "number of this node, from 0 on, and 0 is that of rendezvous; null lets the nodes agree", None, least=0
    )
    rendezvous: str | None = setting("HOST:PORT of one of several nodes, where they meet", None)


@dataclass
class TrainConfig(ProcessesConfig):
    stage: StageConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracking: TrackingConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    objective: ObjectiveConfig = MISSING
    lora: LoraConfig = field(default_factory=LoraConfig)
    ema: EmaConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    samples: SamplesConfig = MISSING
    validation: ValidationConfig = MISSING
    runs_dir: FilePath = setting("folder of all runs")
    run_dir: FilePath = setting("folder of this run")
    seed: int = setting("seed of weights, data order and noise", least=0)
    log_every_steps: int = setting("steps between lines of the log", least=1)
    watchdog_seconds: float | None = setting(WATCHDOG, least=1)
    max_restarts: int = setting("how often a Slurm job requeues itself; 0 never does", least=0)


@dataclass
class PlanConfig(TrainConfig):
    gpus: int = setting("number of processes on all nodes, one per GPU", least=1)
    format: str = setting("output for people or for programs", choices=("table", "json"))
    rate: FilePath | None = setting(
        "result of `vdtrain bench`, whose rates replace those of hardware.rates, or folder in which one is looked for "
        "that measured this hardware; null for none"
    )
    price_per_gpu_hour: float | None = setting("cost of a GPU hour, in any currency; null if not known", least=0)
    curriculum: list[str] = setting("stages that `vdtrain plan curriculum` adds up")


@dataclass
class BenchConfig(TrainConfig):
    resolution: int | None = setting("side of the images in pixels; null for the stage's first phase", least=1)
    warmup_steps: int = setting("steps before the timed ones", least=1)
    timed_steps: int = setting("steps that are timed", least=1)
    micro_batches: int | None = setting(
        "micro-batches of a step, each of hardware.micro_batch_size; null for as many as the stage's batch needs",
        least=1,
    )
    profile: bool = setting("write a Chrome trace of one step beside the output, and sum up its GPU kernels")
    output: FilePath | None = setting("JSON file of the result; null only prints")
    overwrite: bool = setting("replace an existing file", False)


@dataclass
class PreflightConfig(TrainConfig):
    ranks: int | None = setting(
        "number of processes that will train; null for gpus x nnodes, else WORLD_SIZE, else SLURM_NTASKS (1 inside a "
        "step of one task), else 1"
    )
