"""Published weights of the frozen parts as what the model's configuration reads, checked against it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from torch import Tensor

from vdtrain.config import ModelConfig
from vdtrain.instantiate import instantiate
from vdtrain.models.clip import ClipImageContext, ClipTextContext, build_clip
from vdtrain.models.frozen_weights import ASSET, WeightsError, compare
from vdtrain.models.image_vae import ImageVAE
from vdtrain.models.optimus import Optimus
from vdtrain.weights.clip_names import to_open_clip
from vdtrain.weights.image_vae_names import to_diffusers

Specification = Mapping[str, Any]
CAUSAL_MASK = re.compile(r"decoder\.transformer\.h\.\d+\.attn\.bias")
WORDS, HEAD = "decoder.transformer.wte.weight", "decoder.lm_head.weight"
# What OpenAI's own file has beside the weights.
CLIP_SIZES = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class Target:
    """A file that the model's configuration names, and the part that reads it.

    Attributes:
        setting: that holds the path.
        specification: of the part, its `_target_` and arguments.
    """

    setting: str
    path: Path
    specification: Specification

    @property
    def place(self) -> str:
        return f"{self.setting}={self.path}"


@dataclass(frozen=True)
class FrozenPart:
    """Where a frozen part stands in the configuration of a modality, and which classes it is made of."""

    part: str
    kinds: tuple[type, ...]
    argument: str = "weights"

    def targets(self, model: ModelConfig) -> list[Target]:
        """The files that hold it, each once.

        Raises:
            WeightsError: the model has no such part, or names no file of the user's for it.
        """
        found: dict[Path, Target] = {}
        for name, modality in model.modalities.items():
            specification = getattr(modality, self.part)
            target = get_object(str(specification.get("_target_")))
            if not (isinstance(target, type) and issubclass(target, self.kinds)):
                continue
            setting = f"model.modalities.{name}.{self.part}.{self.argument}"
            path = specification.get(self.argument)
            if path is None or str(path).startswith(ASSET):
                raise WeightsError(f"{setting}={path}: no file to write to; set it to the file that is to be made")
            found.setdefault(Path(path).expanduser(), Target(setting, Path(path).expanduser(), specification))
        if not found:
            kinds = " or ".join(kind.__name__ for kind in self.kinds)
            raise WeightsError(f"model.modalities: none has a {self.part} of {kinds} in model={model.name}")
        return list(found.values())


IMAGE_VAE = FrozenPart("vae", (ImageVAE,))
TEXT_VAE = FrozenPart("vae", (Optimus,))
CLIP = FrozenPart("context_encoder", (ClipTextContext, ClipImageContext))
BERT_TOKENIZER = FrozenPart("vae", (Optimus,), "encoder_tokenizer")
GPT2_TOKENIZER = FrozenPart("vae", (Optimus,), "decoder_tokenizer")

Convert = Callable[[Mapping[str, Tensor], Specification, str], dict[str, Tensor]]
"""(published tensors, the part's specification, the place for errors) -> the part's tensors, in the precision given."""


def image_vae(tensors: Mapping[str, Tensor], specification: Specification, place: str) -> dict[str, Tensor]:
    """CompVis' kl-f8, alone or within Stable Diffusion, or diffusers' AutoencoderKL."""
    state = to_diffusers(tensors)
    built = _without_values(specification)
    _check(built.autoencoder.state_dict(), state, place, "the image VAE (kl-f8.pth, or a vae folder of diffusers)")
    return state


def text_vae(tensors: Mapping[str, Tensor], specification: Specification, place: str) -> dict[str, Tensor]:
    """Optimus, without what follows from the rest: causal masks, and the head, which is the word embedding."""
    state = dict(tensors)
    for name in [name for name in state if CAUSAL_MASK.fullmatch(name)]:
        mask = state.pop(name)
        if mask.ndim < 2 or not torch.equal(mask.float(), torch.ones_like(mask, dtype=torch.float).tril()):
            raise WeightsError(f"{place}: {name} is no causal mask; give the released optimus-vae.pth")
    head = state.pop(HEAD, None)
    if head is not None and not (WORDS in state and torch.equal(head, state[WORDS])):
        raise WeightsError(
            f"{place}: {HEAD} differs from {WORDS}, and they are one in this model; give optimus-vae.pth"
        )
    expected = _without_values({**specification, "encoder_tokenizer": None, "decoder_tokenizer": None}).state_dict()
    expected.pop(HEAD)
    _check(expected, state, place, "the text VAE (optimus-vae.pth)")
    return state


def clip(tensors: Mapping[str, Tensor], specification: Specification, place: str) -> dict[str, Tensor]:
    """CLIP by open_clip or by Hugging Face."""
    hugging_face = any(name.startswith("text_model.") for name in tensors)
    state = to_open_clip(tensors) if hugging_face else dict(tensors)
    state = {name: tensor for name, tensor in state.items() if name not in CLIP_SIZES}
    with torch.device("meta"):
        expected = build_clip(specification["architecture"], None).state_dict()
    _check(expected, state, place, f"CLIP {specification['architecture']}")
    return state


def _without_values(specification: Specification) -> Any:
    """A part on the meta device: names and shapes."""
    with torch.device("meta"):
        return instantiate({**specification, "weights": None}, "model.modalities")


def _check(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], place: str, what: str) -> None:
    if differences := compare(expected, found):
        raise WeightsError(f"{place}: not {what} that the model's configuration describes: {differences}")
