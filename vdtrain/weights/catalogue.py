"""Names: what `vdtrain weights` imports from and exports to. Light, so that help and mistakes need no libraries."""

from __future__ import annotations

from dataclasses import dataclass

RELEASED = "hf:shi-labs/versatile-diffusion{}@2926f8e11ea526b562cd592b099fcf9c2985d0b7"


@dataclass(frozen=True)
class Source:
    """A kind of published weights.

    Attributes:
        text: what it is, in a line of help.
        address: where it is taken from if no path is given; None if no such place is known.
        parts: what is needed of a folder of a repository; none for all weights in it.
        output: where its diffuser goes if no output is given; None for frozen parts.
    """

    text: str
    address: str | None = None
    parts: tuple[str, ...] = ()
    output: str | None = None


SOURCES = {
    "versatile_diffusion": Source(
        "Versatile Diffusion: vd-four-flow-v1-0.pth of 2023, or vd-official.pth of 2022 with its frozen parts",
        RELEASED.format("/pretrained_pth/vd-four-flow-v1-0.pth"),
        output="weights/versatile_diffusion",
    ),
    "diffusers": Source(
        "Versatile Diffusion as a folder of diffusers; its diffuser alone",
        RELEASED.format(""),
        ("image_unet", "text_unet", "scheduler"),
        "weights/versatile_diffusion",
    ),
    "safetensors": Source(
        "a weights folder that `vdtrain weights export safetensors` wrote", output="weights/versatile_diffusion"
    ),
    "stable_diffusion": Source(
        "Stable Diffusion v1 as the start of stage 1: sd-v1-4.ckpt, or a folder of diffusers",
        "hf:CompVis/stable-diffusion-v1-4@133a221b8aa7292a167afc5127cb63fb5005638b",
        ("unet", "scheduler"),
        "weights/stable_diffusion_v1",
    ),
    "image_vae": Source(
        "the image VAE: kl-f8.pth, Stable Diffusion's file, or a vae folder of diffusers",
        RELEASED.format("/pretrained_pth/kl-f8.pth"),
    ),
    "text_vae": Source("the text VAE Optimus: optimus-vae.pth", RELEASED.format("/pretrained_pth/optimus-vae.pth")),
    "clip": Source(
        "CLIP ViT-L/14, by Hugging Face or by open_clip",
        "hf:openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41",
    ),
    "bert_tokenizer": Source(
        "BERT-base-cased's tokenizer: tokenizer.json or vocab.txt",
        "hf:google-bert/bert-base-cased@cd5ef92a9fb2f889e972770a36d4ed042daf221e",
        ("tokenizer.json", "vocab.txt"),
    ),
    "gpt2_tokenizer": Source(
        "GPT-2's tokenizer: tokenizer.json, or vocab.json and merges.txt",
        "hf:openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
        ("tokenizer.json", "vocab.json", "merges.txt"),
    ),
}

FORMATS = {
    "versatile_diffusion": "one .pth in the layout of the released vd-four-flow-v1-0",
    "safetensors": "a weights folder: the same keys as safetensors, with the model's configuration",
    "diffusers": "a folder of diffusers' Versatile Diffusion pipelines, frozen parts included",
}

PRECISIONS = ("fp32", "fp16", "bf16", "keep")
