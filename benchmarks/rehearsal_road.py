"""The parts of the rehearsal: the commands of the documents, in the order in which a user comes to them."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STAGES = ("stage1_single_flow", "stage2_dual_flow", "stage3_four_flow")
WRITE = f"python {shlex.quote(str(Path(__file__).with_name('published_weights.py')))}"
# Kind -> the file as it is published, and what its import makes; the last two are the largest.
FROZEN = {
    "bert_tokenizer": ("downloads/bert-base-cased", "weights/bert-base-cased.json"),
    "gpt2_tokenizer": ("downloads/gpt2", "weights/gpt2.json"),
    "image_vae": ("downloads/kl-f8.pth", "weights/kl-f8.safetensors"),
    "text_vae": ("downloads/optimus-vae.pth", "weights/optimus-vae.safetensors"),
    "clip": ("downloads/clip-vit-large-patch14", "weights/clip-vit-l-14.safetensors"),
}
START = ("downloads/sd-v1-4.ckpt", "weights/stable_diffusion_v1")
RELEASE = ("downloads/vd-four-flow-v1-0.pth", "weights/versatile_diffusion")
INCEPTION = "downloads/pt_inception-2015-12-05-6726825d.pth"
IMAGE, PROMPT = "images/images/000000.jpg", '"a lighthouse at dusk, in rain"'
INPUTS = {"text-to-image": PROMPT, "image-to-image": IMAGE, "image-to-text": IMAGE, "text-to-text": PROMPT}


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        model: settings of the model whose published weights are imported.
        narrow: settings of the model that is trained, whose frozen parts are the same.
        plan, preflight: settings of these commands for a stage of `model`.
        train: settings of every stage, beside its phases of `steps` steps at each of `resolutions`.
        threads: of a stage that one process trains alone.
        download: settings of the drawn set's way into shards, of `images` of `pixels` on a side.
        fid: whether FID is among the figures: half a minute, whatever the model.
        disk, memory: GB that must be free.
    """

    model: str
    narrow: str
    plan: str
    preflight: str
    train: str
    threads: int
    resolutions: tuple[int, int]
    steps: int
    images: int
    pixels: int
    download: str
    fid: bool
    disk: float
    memory: float

    @property
    def phases(self) -> str:
        """The stage's phases, as they are typed."""
        phases = ",".join(f"{{resolution:{side},samples:{self.steps * BATCH}}}" for side in self.resolutions)
        return f"'stage.phases=[{phases}]' stage.global_batch_size={BATCH}"


# Two processes, a pair each.
BATCH = 2
TINY_MODEL = " ".join(
    (
        "model=tiny",
        "model.base_weights=weights/stable_diffusion_v1",
        "model.modalities.image.vae.weights=weights/kl-f8.safetensors",
        "model.modalities.text.vae.weights=weights/optimus-vae.safetensors",
        "model.modalities.text.vae.encoder_tokenizer=weights/bert-base-cased.json",
        "model.modalities.text.vae.decoder_tokenizer=weights/gpt2.json",
        "model.modalities.image.context_encoder.weights=weights/clip-vit-l-14.safetensors",
        "model.modalities.text.context_encoder.weights=weights/clip-vit-l-14.safetensors",
    )
)
SIZES = {
    "full": Size(
        model="",
        narrow="'model.diffuser.channels=[80,160,320,320]' model.diffuser.norm_groups=16",
        plan="hardware=h100 gpus=8",
        preflight="hardware=h100 hardware.loader_workers=1 ranks=2 stage.samples_scale=0.001 tracking=offline",
        train="hardware=cpu '+hardware.micro_batch_size={256:1,512:1}' tracking=offline",
        threads=2,
        resolutions=(256, 512),
        steps=2,
        images=64,
        pixels=640,
        download="",
        fid=True,
        disk=40,
        memory=16,
    ),
    "tiny": Size(
        model=TINY_MODEL,
        narrow=TINY_MODEL,
        plan="hardware=cpu gpus=2 'stage.phases=[{resolution: 32, samples: 640}]'",
        preflight="hardware=cpu ranks=2 tracking=offline",
        train="hardware=cpu 'hardware.micro_batch_size={32:1,64:1}' tracking=none",
        threads=1,
        resolutions=(32, 64),
        steps=5,
        images=64,
        pixels=256,
        download="data.download.image_size=64 data.download.min_image_size=32",
        fid=False,
        disk=1,
        memory=2,
    ),
}


@dataclass(frozen=True)
class Interruption:
    """A signal to the processes of a run, as soon as it has recorded a step."""

    run: str
    step: int
    number: signal.Signals


@dataclass(frozen=True)
class Part:
    """Commands that are measured together.

    Attributes:
        makes: what they write; whatever stands there is removed before they start.
        drops: what nothing needs any more once they are done.
        server: a command that runs beside them, and the port that it listens at.
        interruption: of the only command, which is then to end as a stopped run does.
        says: what the commands are to have said.
    """

    name: str
    commands: tuple[str, ...]
    makes: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    server: tuple[str, int] | None = None
    interruption: Interruption | None = None
    says: str = ""


def road(size: Size, port: int) -> list[Part]:
    """All parts, in their order.

    Args:
        port: at which the drawn images are served on this machine.
    """
    return [*_data(size, port), *_weights(size), *_curriculum(size), *_use(size)]


def _data(size: Size, port: int) -> Iterator[Part]:
    drawn = f"data=shapes data.shapes.folder=images data.shapes.port={port}"
    few = f"data.shapes.images={size.images} data.shapes.pixels={size.pixels}"
    yield Part("draw images and their metadata", (f"python -m miniature draw {drawn} {few}",), ("images",))
    tables = " ".join(f"data.sources.{name}.metadata=images/{name}.parquet" for name in ("laion2b_en", "coyo700m"))
    yield Part(
        "select, download, index, inspect",
        (
            f"python -m data_pipeline select {tables} data.select.processes=1 data.allow_loopback=true {size.download}",
            f"python -m data_pipeline download {size.download} data.download.processes=1 data.allow_loopback=true",
            "python -m data_pipeline index data.index.processes=1 data.index.decode=true",
            "python -m data_pipeline inspect data.inspect.images=8",
        ),
        makes=("data",),
        server=(f"python -m miniature serve {drawn}", port),
    )


def _weights(size: Size) -> Iterator[Part]:
    published = tuple(file for file, _ in FROZEN.values())
    yield Part("write the frozen parts as published", (_written(*FROZEN, settings=size.model),), published)
    for kind, (file, imported) in FROZEN.items():
        yield Part(f"import {kind}", (_imported(kind, file, size.model),), (imported,), (file,))
    for kind, (file, imported) in {"stable_diffusion": START, "versatile_diffusion": RELEASE}.items():
        yield Part(f"write {kind} as published", (_written(kind, settings=size.model),), (file,))
        yield Part(f"import {kind}", (_imported(kind, file, size.model),), (imported,), (file,))
        if imported == START[1]:
            command = f"vdtrain preflight stage={STAGES[0]} {size.preflight} {size.model}"
            yield Part("stage 1 at full width: preflight", (command,), drops=(imported,))
    sampling = f"resolution={size.resolutions[0]} steps=1 precision=bf16 output_dir=samples/released"
    yield Part(
        "sample the imported versatile_diffusion in bf16",
        (f"vdtrain sample {RELEASE[1]} {INPUTS['text-to-image']} {sampling}",),
        drops=(RELEASE[1],),
    )
    for number, stage in enumerate(STAGES, start=1):
        yield Part(f"stage {number} at full width: plan", (f"vdtrain plan stage={stage} {size.plan} {size.model}",))


def _written(*kinds: str, settings: str) -> str:
    return f"{WRITE} downloads {' '.join(kinds)} {settings}"


def _imported(kind: str, file: str, settings: str) -> str:
    return f"vdtrain weights import {kind} {file} {settings}"


def _curriculum(size: Size) -> Iterator[Part]:
    yield Part(
        "write and import stable_diffusion of a quarter of the width",
        (
            _written("stable_diffusion", settings=size.narrow),
            _imported("stable_diffusion", START[0], size.narrow),
        ),
        START,
        START[:1],
    )
    # Stopped in the first phase, in the second one, and as a single process.
    starts = (
        ("torchrun --standalone --nproc-per-node=2 -m vdtrain train", 1, signal.SIGUSR1, ""),
        ("torchrun --standalone --nproc-per-node=2 -m vdtrain train", size.steps, signal.SIGUSR1, ""),
        ("vdtrain train", 1, signal.SIGTERM, f"hardware.threads={size.threads}"),
    )
    for number, (stage, (start, step, stop, threads)) in enumerate(zip(STAGES, starts, strict=True), start=1):
        settings = f"stage={stage} {size.train} {size.phases} {size.narrow}"
        command = f"{start} {settings} {threads} log_every_steps=1 watchdog_seconds=1800"
        run = f"runs/{stage}"
        yield Part(f"stage {number}: preflight", (f"vdtrain preflight {settings} ranks={BATCH}",))
        stopped = Interruption(run, step, stop)
        yield Part(f"stage {number}: train, {stop.name} after a step", (command,), (run,), interruption=stopped)
        yield Part(
            f"stage {number}: resume, to its end",
            (command, f"vdtrain status {run}"),
            says=f"{stage} continues from {run}/checkpoints/step-",
        )


def _use(size: Size) -> Iterator[Part]:
    run = f"runs/{STAGES[-1]}"
    small = f"resolution={size.resolutions[0]} steps=2"
    for flow, given in INPUTS.items():
        command = f"vdtrain sample {run} {given} flow={flow} {small} output_dir=samples/{flow}"
        yield Part(f"sample {flow}", (command,), (f"samples/{flow}",))
    yield Part(
        "blend, edit",
        (
            f"vdtrain blend {run} 'text:a yellow square' image:{IMAGE} {small} output_dir=samples/blend",
            f"vdtrain edit {run} {IMAGE} remove='a star' add='a circle' {small} output_dir=samples/edit",
        ),
        ("samples/blend", "samples/edit"),
    )
    evaluation = f"vdtrain evaluate {run} {small} samples=8 batch_size=4 loader_workers=1 data.manifest=data/manifest"
    if size.fid:
        inception = _written("inception", settings=size.model)
        commands, made = (inception, f"{evaluation} fid.weights={INCEPTION}"), (INCEPTION,)
    else:
        commands, made = (evaluation,), ()
    yield Part("evaluate on eight pairs", commands, ("evaluation", *made), made)
    for form, output in (("versatile_diffusion", "exported.pth"), ("diffusers", "exported")):
        command = f"vdtrain weights export {form} {output} {run}"
        yield Part(f"export {form}", (command,), (output,))
    yield Part(
        "import the exported versatile_diffusion",
        (_imported("versatile_diffusion", "exported.pth", f"{size.narrow} output=weights/exported"),),
        ("weights/exported",),
        ("weights/exported", "exported.pth"),
    )
    side = size.resolutions[0]
    opening = (
        "from diffusers import VersatileDiffusionPipeline; "
        "pipeline = VersatileDiffusionPipeline.from_pretrained('exported'); "
        f"made = pipeline.text_to_image('a red circle', height={side}, width={side}, num_inference_steps=1); "
        "made.images[0].save('samples/diffusers.png')"
    )
    yield Part(
        "open the exported folder in diffusers, one step", (f"python -c {shlex.quote(opening)}",), drops=("exported",)
    )
