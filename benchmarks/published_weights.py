"""Made-up weights and vocabularies in the very layouts that the real ones were published in, for a model of any size.

python benchmarks/published_weights.py FOLDER KIND ... [SETTING=VALUE ...]
python benchmarks/published_weights.py downloads image_vae text_vae model=tiny

The settings are those of the model. Tensors are drawn so that a network of them computes with numbers of ordinary size,
the same ones each time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate, islice, product
from pathlib import Path
from string import ascii_lowercase
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from miniature.shapes import vocabulary
from vdtrain.config.command_schema import WeightsConfig
from vdtrain.config.compose import compose, to_object
from vdtrain.config.instantiate import instantiate
from vdtrain.config.schema import ModelConfig
from vdtrain.evaluation.inception import InceptionFeatures
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.clip import build_clip
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.layer_plan import make_plan
from vdtrain.weights.exports import write_torch
from vdtrain.weights.frozen_parts import (
    CLIP,
    END_OF_TEXT,
    IMAGE_VAE,
    RELEASED_ENCODER,
    RELEASED_ENCODER_SIZE,
    TEXT_VAE,
    FrozenPart,
)
from vdtrain.weights.published.checks import schedule_buffers
from vdtrain.weights.published.diffusers_names import translated
from vdtrain.weights.published.frozen_names import to_hugging_face
from vdtrain.weights.published.stable_diffusion import UNET_PREFIX, compvis_modules
from vdtrain.weights.published.versatile_diffusion import to_released
from vdtrain.weights.tensor_files import Entry, LazyTensors

VAE_PREFIX, CLIP_TEXT_PREFIX = "first_stage_model.", "cond_stage_model.transformer."
MASK, HEAD, WORDS = "decoder.transformer.h.{}.attn.bias", "decoder.lm_head.weight", "decoder.transformer.wte.weight"
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"
WORD_START = "Ġ"


def drawn(outline: Mapping[str, Tensor], variance: float = 1.0) -> LazyTensors:
    """Values for a state dict that has none: a tensor is drawn when it is read, the same each time.

    Matrices and kernels are normal, of `variance` over the number of their inputs; scales are 1, and the rest is 0.
    """

    def entry(name: str, like: Tensor) -> Entry:
        def draw() -> Tensor:
            if like.ndim > 1 and like.is_floating_point():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                deviation = (variance / like[0].numel()) ** 0.5
                return torch.randn(like.shape, generator=generator).mul_(deviation).to(like.dtype)
            fill = torch.ones if name.endswith(("weight", "running_var")) else torch.zeros
            return fill(like.shape, dtype=like.dtype)

        return Entry(like.shape, like.dtype, draw)

    return LazyTensors({name: entry(name, like) for name, like in outline.items()})


def diffuser(model: ModelConfig) -> LazyTensors:
    """The whole diffuser by our names."""
    with torch.device("meta"):
        return drawn(Diffuser(model, active_groups(all_flows(model.modalities))).state_dict())


def versatile_diffusion(model: ModelConfig) -> LazyTensors:
    """The release of February 2023: the diffuser, and the buffers of its noise schedule."""
    ours = diffuser(model)
    released = ours.renamed({to_released(name): name for name in ours})
    return LazyTensors(released.entries | LazyTensors.of(_buffers(model)).entries)


def stable_diffusion(model: ModelConfig) -> dict[str, Any]:
    """CompVis' checkpoint: all networks in one state dict, and what PyTorch Lightning keeps beside it."""
    tensors = _buffers(model)
    tensors |= {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(470_000, dtype=torch.int),
    }
    tensors |= {UNET_PREFIX + name: tensor for name, tensor in unet(model).items()}
    tensors |= {VAE_PREFIX + name: tensor for name, tensor in image_vae(model).items()}
    text = {name: tensor for name, tensor in clip(model, ("text",)).items() if name.startswith("text_model.")}
    tensors |= {CLIP_TEXT_PREFIX + name: tensor for name, tensor in text.items()}
    callback = {
        "monitor": "val/loss_simple_ema",
        "best_model_score": torch.tensor(0.1),
        "best_model_path": "logs/checkpoints/epoch=000002.ckpt",
        "current_score": np.float64(0.1),
    }
    return {
        "epoch": 2,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": tensors,
        "callbacks": {type("ModelCheckpoint", (), {"__module__": LIGHTNING}): callback},
        "optimizer_states": [],
        "lr_schedulers": [{"last_epoch": 470_000, "_last_lr": [np.float64(1e-4)]}],
    }


def unet(model: ModelConfig) -> LazyTensors:
    """Stable Diffusion's U-Net under CompVis' names, without their prefix."""
    modules, own = compvis_modules(make_plan(model.diffuser), model.base_modality), diffuser(model)
    return own.renamed({key: name for name in own if (key := translated(name, modules))})


def image_vae(model: ModelConfig) -> LazyTensors:
    """kl-f8 under CompVis' names, without their prefix."""
    return compvis_vae(drawn(_outline(model, IMAGE_VAE).autoencoder.state_dict()))


def compvis_vae(state: LazyTensors) -> LazyTensors:
    """diffusers' AutoencoderKL under CompVis' names."""
    levels = len({key.split(".")[2] for key in state if key.startswith("decoder.up_blocks.")})
    return LazyTensors({_compvis_name(key, levels): _as_kernel(key, state.entries[key]) for key in state})


def _compvis_name(key: str, levels: int) -> str:
    """CompVis' name of a tensor of diffusers' AutoencoderKL."""
    name = re.sub(r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block.", key)
    name = re.sub(r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample.", name)
    # CompVis counts the decoder's levels from the image, diffusers from the latent.
    name = re.sub(r"up_blocks\.(\d+)\.", lambda match: f"up.{levels - 1 - int(match[1])}.", name)
    name = name.replace(".resnets.", ".block.").replace("upsamplers.0", "upsample")
    name = name.replace("mid_block.block.0", "mid.block_1").replace("mid_block.block.1", "mid.block_2")
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    for new, old in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
    return name


def _as_kernel(key: str, entry: Entry) -> Entry:
    """diffusers' linear layers are convolutions of one pixel there."""
    if "attentions" not in key or len(entry.shape) != 2:
        return entry
    shape = torch.Size([*entry.shape, 1, 1])
    return Entry(shape, entry.dtype, lambda: entry.read().view(shape))


def text_vae(model: ModelConfig) -> dict[str, Tensor]:
    """Optimus: with causal masks, the head, and BERT's position ids."""
    built = _outline(model, TEXT_VAE, encoder_tokenizer=None, decoder_tokenizer=None)
    state = dict(drawn({name: tensor for name, tensor in built.state_dict().items() if name != HEAD}))
    length = state["decoder.transformer.wpe.weight"].shape[0]
    positions = torch.arange(state["encoder.embeddings.position_embeddings.weight"].shape[0])[None]
    mask = torch.ones(length, length).tril()[None, None]
    masks = {MASK.format(layer): mask.clone() for layer in range(built.decoder.config.n_layer)}
    return {**state, HEAD: state[WORDS].clone(), **masks, "encoder.embeddings.position_ids": positions}


def clip(model: ModelConfig, towers: Collection[str] = ("text", "vision")) -> dict[str, Tensor]:
    """CLIP by Hugging Face, as its older versions wrote it: with the position ids of its towers."""
    (target,) = CLIP.targets(model)
    with torch.device("meta"):
        built = build_clip(target.specification["architecture"], None)
    outline = {name: tensor for name, tensor in built.state_dict().items() if _tower(name) in towers}
    positions = {"vision": len(built.visual.positional_embedding), "text": built.context_length}
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(positions[tower])[None] for tower in towers}
    return {**to_hugging_face(drawn(outline)), **ids}


def _tower(name: str) -> str:
    return "vision" if name.startswith("visual.") else "text"


def inception() -> dict[str, Tensor]:
    """The network that FID is defined by, with the classifier that nothing asks."""
    with torch.device("meta"):
        state = InceptionFeatures(None).network.state_dict()
    # Without norms of their own in this state, its many rectifiers would halve the variance each.
    return {**drawn(state, variance=2.0), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def bert_vocabulary(model: ModelConfig) -> list[str]:
    """As many entries as the text VAE's encoder has: special ones, letters, words of drawn captions, unused ones."""
    (target,) = TEXT_VAE.targets(model)
    size = int(target.specification["encoder_vocabulary"])
    specials = {0: "[PAD]", 1: "[UNK]", 2: "[CLS]", 3: "[SEP]", 4: "[MASK]"}
    if size == RELEASED_ENCODER_SIZE:
        specials = {index: name for name, index in RELEASED_ENCODER.items()} | {100: "[UNK]", 103: "[MASK]"}
    letters = [*ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase)]
    others = dict.fromkeys([*letters, *vocabulary(), *(f"[unused{number}]" for number in range(size))])
    rest = iter(others)
    return [specials[index] if index in specials else next(rest) for index in range(size)]


def gpt2_vocabulary(model: ModelConfig) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The entries of the text VAE's decoder without its own three, in GPT-2's order, and the merges that make them."""
    (target,) = TEXT_VAE.targets(model)
    symbols = sorted(ByteLevel.alphabet())
    # The three that Optimus adds are not GPT-2's, and the last of GPT-2's is no merge.
    merges = list(islice(_merges(), int(target.specification["decoder_vocabulary"]) - 3 - 1 - len(symbols)))
    entries = [*symbols, *(first + second for first, second in merges), END_OF_TEXT]
    return {entry: index for index, entry in enumerate(entries)}, merges


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs of which each part is a symbol or has been made before, without end to speak of."""
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    yield from ((WORD_START, letter) for letter in ascii_lowercase)
    yield from product(ascii_lowercase, repeat=2)
    yield from product(pairs, repeat=2)


def _buffers(model: ModelConfig) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in schedule_buffers(model.schedule).items()}


def _outline(model: ModelConfig, part: FrozenPart, **changes: Any) -> Any:
    """A frozen part on the meta device."""
    (target,) = part.targets(model)
    with torch.device("meta"):
        return instantiate({**target.specification, "weights": None, **changes}, target.setting)


def _save_stable_diffusion(path: Path, model: ModelConfig) -> None:
    content = stable_diffusion(model)
    (kept,) = content["callbacks"]
    # Pickles name a class by its module, which is not installed here; its parents are imported first.
    modules = {name: ModuleType(name) for name in accumulate(LIGHTNING.split("."), "{}.{}".format)}
    modules[LIGHTNING].__dict__[kept.__name__] = kept
    with patch.dict(sys.modules, modules):
        torch.save(content, path)


def _save_bert(folder: Path, model: ModelConfig) -> None:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(bert_vocabulary(model)) + "\n", encoding="utf-8")


def _save_gpt2(folder: Path, model: ModelConfig) -> None:
    entries, merges = gpt2_vocabulary(model)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(entries), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _save_clip(folder: Path, model: ModelConfig) -> None:
    folder.mkdir()
    save_file(clip(model), folder / "model.safetensors", metadata={"format": "pt"})


# Kind -> its published name, and what writes it. All but FID's network are sources of `vdtrain weights import`.
KINDS: dict[str, tuple[str, Callable[[Path, ModelConfig], object]]] = {
    "stable_diffusion": ("sd-v1-4.ckpt", _save_stable_diffusion),
    "versatile_diffusion": ("vd-four-flow-v1-0.pth", lambda path, model: write_torch(path, versatile_diffusion(model))),
    "image_vae": ("kl-f8.pth", lambda path, model: torch.save({"state_dict": dict(image_vae(model))}, path)),
    "text_vae": ("optimus-vae.pth", lambda path, model: torch.save(text_vae(model), path)),
    "clip": ("clip-vit-large-patch14", _save_clip),
    "bert_tokenizer": ("bert-base-cased", _save_bert),
    "gpt2_tokenizer": ("gpt2", _save_gpt2),
    "inception": ("pt_inception-2015-12-05-6726825d.pth", lambda path, model: torch.save(inception(), path)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write some of `KINDS` into a folder, which is made if it is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", nargs="+", metavar="KIND", help=", ".join(KINDS))
    arguments = parser.parse_args(argv)
    kinds = [word for word in arguments.kind if "=" not in word]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"{unknown[0]}: not one of {', '.join(KINDS)}")
    model = to_object(compose("weights", [word for word in arguments.kind if "=" in word]), WeightsConfig).model
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        name, save = KINDS[kind]
        save(arguments.folder / name, model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
