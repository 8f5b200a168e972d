"""The frozen parts: one VAE and one context encoder per modality; each runs once per batch of pairs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vdtrain.config.instantiate import instantiate
from vdtrain.config.schema import ModelConfig
from vdtrain.errors import ConfigError
from vdtrain.flows import Flow
from vdtrain.models.frozen_weights import freeze, shared_loading


class VAE(Protocol):
    """Samples of a modality to latents and back."""

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one latent for images of `size`, height and width in pixels; other modalities may ignore it."""

    def encode(self, samples: Any, noise: Tensor | None = None) -> Tensor:
        """Latents [B, *latent_shape] of a batch: posterior samples if standard normal noise of that shape is given."""

    def decode(self, latents: Tensor, generators: Sequence[torch.Generator] | None = None) -> Any:
        """Samples of the modality from latents [B, *latent_shape].

        A decoder that draws random numbers takes those of each row from the row's own generator.
        """


@runtime_checkable
class MomentsVAE(VAE, Protocol):
    """A VAE that encodes in two halves: moments, which depend on the sample alone and can be cached, and the draw."""

    def moments(self, samples: Any) -> Tensor:
        """The moments [B, ...] of each sample's posterior."""

    def from_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """The latents that `encode` returns, from the samples' moments, which may have any device and precision."""


class ContextEncoder(Protocol):
    """Samples of a modality to the tokens that the diffuser's cross-attention reads."""

    def encode(self, samples: Any) -> Tensor:
        """Contexts [B, tokens, D] of a batch."""

    def unconditional(self, batch: int, output: str) -> Tensor:
        """The context [batch, tokens, D] without a sample, for classifier-free guidance of the modality `output`."""


@runtime_checkable
class MaskedContextEncoder(ContextEncoder, Protocol):
    """A context encoder that can hide parts of a sample."""

    def encode_masked(self, samples: Any, masks: Tensor) -> Tensor:
        """Contexts [B, tokens, D] of a batch with masks [B, 1, h, w] in 0..1; 0 hides a part."""


@runtime_checkable
class Preparing(Protocol):
    """A VAE or context encoder whose CPU work, such as tokenising, can be done before `encode`."""

    def prepare(self, samples: Any) -> Any:
        """The form of a batch of samples that `encode` also accepts; called on a thread beside training."""


@runtime_checkable
class InBlocks(Protocol):
    """A VAE or context encoder that names the modules in which `encode` spends its time, so that they are compiled."""

    def blocks(self) -> Iterable[nn.Module]:
        """These modules, none inside another."""


@dataclass(frozen=True)
class Prepared:
    """A batch of one modality in two forms, for its VAE and its context encoder, each a tensor or a list [B]."""

    vae: Any
    context: Any

    def __getitem__(self, rows: slice) -> Prepared:
        return Prepared(self.vae[rows], self.context[rows])


def each_tensor(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch of one modality, a tensor, a list or `Prepared`, with its tensors changed."""
    if isinstance(batch, Prepared):
        return Prepared(each_tensor(change, batch.vae), each_tensor(change, batch.context))
    return change(batch) if isinstance(batch, Tensor) else batch


@dataclass(frozen=True)
class Encoded:
    """The diffuser's view of a batch, by modality: latents [B, ...] and contexts [B, tokens, D].

    Attributes:
        rows: of modalities that some of the batch's pairs lack, int64 [B] the pairs of their latents and contexts. If
            no pair has one, its latents are one row of zeros, and it has no contexts.
    """

    latents: dict[str, Tensor]
    contexts: dict[str, Tensor]
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Encoded:
        """The same on another device."""
        latents = {name: tensor.to(device) for name, tensor in self.latents.items()}
        return Encoded(latents, {name: tensor.to(device) for name, tensor in self.contexts.items()}, self.rows)

    def pairs_of(self, flow: Flow) -> Tensor | None:
        """See `pairs_of`."""
        return pairs_of(flow, self.rows)

    def of(self, modality: str, pairs: Tensor) -> Tensor:
        """int64 [n]: which of the modality's latents and contexts are those of the pairs int64 [n]."""
        return torch.searchsorted(self.rows[modality], pairs) if modality in self.rows else pairs


def pairs_of(flow: Flow, rows: Mapping[str, Tensor]) -> Tensor | None:
    """int64 [n] the pairs of a batch that have both of a flow's modalities; None for all.

    Args:
        rows: see `vdtrain.data.batch.Batch`.
    """
    output, context = rows.get(flow.output), rows.get(flow.context)
    if output is None or context is None:
        return context if output is None else output
    return output[torch.isin(output, context)]


class FrozenParts(nn.Module):
    """VAEs and context encoders of all modalities, without gradients and always in evaluation mode.

    Args:
        parts: by modality, its VAE and its context encoder, both modules (`VAE`, `ContextEncoder`).
    """

    def __init__(self, parts: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.vaes = nn.ModuleDict({modality: vae for modality, (vae, _) in parts.items()})
        self.context_encoders = nn.ModuleDict({modality: encoder for modality, (_, encoder) in parts.items()})
        freeze(self)

    def blocks(self) -> Iterator[nn.Module]:
        """The modules in which the parts' `encode` spends its time; a module that parts share comes once."""
        parts = (*self.vaes.values(), *self.context_encoders.values())
        modules = (module for part in parts if isinstance(part, InBlocks) for module in part.blocks())
        yield from dict.fromkeys(modules)

    def train(self, mode: bool = True) -> FrozenParts:
        """Stay in evaluation mode when the parent module enters training mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def encode(
        self,
        samples: Mapping[str, Any],
        outputs: Collection[str],
        contexts: Collection[str],
        noise: Mapping[str, Tensor] | None = None,
        moments: Mapping[str, Tensor] | None = None,
    ) -> Encoded:
        """Encode a batch of pairs; every needed part runs once.

        Args:
            samples: the batch by modality, in the form that the modality's parts take, or from `prepare`.
            outputs: modalities whose latents are needed.
            contexts: modalities whose contexts are needed.
            noise: standard normal noise for posterior samples, by modality; without it, the latent is the VAE's mean.
            moments: cached moments of the same samples, by modality. They replace the VAE's encoding.

        Raises:
            ConfigError: a needed modality has no samples, or a VAE cannot use cached moments.
        """
        moments = moments or {}
        for modality in [*(name for name in outputs if name not in moments), *contexts]:
            if modality not in samples:
                raise ConfigError(
                    f"samples: no {modality!r} in the batch, only {', '.join(samples)}; the stage's flows need a "
                    "data.stream that yields it"
                )
        noise, given = noise or {}, {name: _both(batch) for name, batch in samples.items()}
        return Encoded(
            latents={
                name: self._from_moments(name, moments[name], noise.get(name))
                if name in moments
                else self._vae(name).encode(given[name].vae, noise.get(name))
                for name in dict.fromkeys(outputs)
            },
            contexts={
                name: self._context_encoder(name).encode(given[name].context) for name in dict.fromkeys(contexts)
            },
        )

    def prepare(
        self, samples: Mapping[str, Any], outputs: Collection[str], contexts: Collection[str]
    ) -> dict[str, Any]:
        """The samples after their CPU work, in a form that `encode` also accepts.

        With a GPU their tensors are in pinned memory, from which a copy to the GPU does not wait.
        """
        prepared = dict(samples)
        for modality, batch in samples.items():
            vae = self._vae(modality) if modality in outputs else None
            encoder = self._context_encoder(modality) if modality in contexts else None
            if any(isinstance(part, Preparing) for part in (vae, encoder)):
                prepared[modality] = Prepared(_prepare(vae, batch), _prepare(encoder, batch))
        if torch.cuda.is_available():
            prepared = {name: each_tensor(Tensor.pin_memory, batch) for name, batch in prepared.items()}
        return prepared

    @torch.no_grad()
    def encode_masked(self, modality: str, samples: Any, masks: Tensor) -> Tensor:
        """Contexts [B, tokens, D] of samples with masks [B, 1, h, w] in 0..1; 0 hides a part.

        Raises:
            ConfigError: the modality's context encoder takes no masks.
        """
        encoder = self._context_encoder(modality)
        if not isinstance(encoder, MaskedContextEncoder):
            raise ConfigError(f"mask: contexts of modality {modality!r} take no mask; leave it out")
        return encoder.encode_masked(samples, masks)

    @torch.no_grad()
    def unconditional(self, flow: Flow, batch: int) -> Tensor:
        """The unconditional context [batch, tokens, D] of the flow's context modality."""
        return self._context_encoder(flow.context).unconditional(batch, flow.output)

    def latent_shape(self, modality: str, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one latent of a modality, for images of `size`, height and width in pixels."""
        return self._vae(modality).latent_shape(size)

    @torch.no_grad()
    def decode(self, modality: str, latents: Tensor, generators: Sequence[torch.Generator] | None = None) -> Any:
        """Samples of a modality from latents [B, ...]; random decoders draw each row from the row's own generator."""
        return self._vae(modality).decode(latents, generators)

    def _from_moments(self, modality: str, moments: Tensor, noise: Tensor | None) -> Tensor:
        vae = self._vae(modality)
        if not isinstance(vae, MomentsVAE):
            raise ConfigError(
                f"data.latents=cached: model.modalities.{modality}.vae has no moments that can be cached; choose inline"
            )
        return vae.from_moments(moments, noise)

    def _vae(self, modality: str) -> VAE:
        vae: VAE = _named(self.vaes, modality)
        return vae

    def _context_encoder(self, modality: str) -> ContextEncoder:
        encoder: ContextEncoder = _named(self.context_encoders, modality)
        return encoder


def _prepare(part: object, batch: Any) -> Any:
    return part.prepare(batch) if isinstance(part, Preparing) else batch


def _both(batch: Any) -> Prepared:
    return batch if isinstance(batch, Prepared) else Prepared(batch, batch)


def _named(modules: nn.ModuleDict, modality: str) -> Any:
    if modality not in modules:
        raise ValueError(f"modality {modality!r} has no frozen parts; the model has {', '.join(modules)}")
    return modules[modality]


def build_frozen(config: ModelConfig) -> FrozenParts:
    """VAE and context encoder of every modality, with their weights, in float32 on the CPU.

    Raises:
        ConfigError: a `_target_` or one of its arguments does not exist.
    """
    with shared_loading():
        return FrozenParts(
            {
                name: (
                    instantiate(modality.vae, f"model.modalities.{name}.vae"),
                    instantiate(modality.context_encoder, f"model.modalities.{name}.context_encoder"),
                )
                for name, modality in config.modalities.items()
            }
        )
