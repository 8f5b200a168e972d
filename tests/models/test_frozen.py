"""The frozen parts together: one pass per part, no gradients, any names of modalities."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.tiny import fresh, normal, tiny
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.flows import Flow
from vdtrain.models.frozen import FrozenParts, Prepared, build_frozen


class CountingVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls: list[Any] = []

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return size

    def encode(self, samples: Tensor, noise: Tensor | None = None) -> Tensor:
        self.calls.append(noise)
        return samples * self.weight

    def decode(self, latents: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        return latents


class CountingContext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def encode(self, samples: Tensor) -> Tensor:
        self.calls += 1
        return self.dropout(samples[:, None])

    def unconditional(self, batch: int, output: str) -> Tensor:
        return torch.zeros(batch, 1, 2)


@pytest.fixture
def toys() -> FrozenParts:
    return FrozenParts({name: (CountingVAE(), CountingContext()) for name in ("sound", "scent")})


def test_every_needed_part_runs_once_and_no_other(toys):
    samples = {"sound": torch.ones(2, 2), "scent": torch.ones(2, 2)}
    noise = torch.zeros(2, 2)
    encoded = toys.encode(samples, ["sound", "sound"], ["scent", "scent"], {"sound": noise})
    assert list(encoded.latents) == ["sound"]
    assert list(encoded.contexts) == ["scent"]
    assert toys.vaes["sound"].calls == [noise]
    assert toys.vaes["scent"].calls == []
    assert [toys.context_encoders[name].calls for name in ("sound", "scent")] == [0, 1]


class MomentsCountingVAE(CountingVAE):
    def moments(self, samples: Tensor) -> Tensor:
        return samples

    def from_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments + (0 if noise is None else noise)


def test_cached_moments_stand_for_the_encoding():
    parts = FrozenParts({"sound": (MomentsCountingVAE(), CountingContext()), "scent": (CountingVAE(), nn.Identity())})
    moments, noise = {"sound": torch.full((2, 2), 3.0)}, {"sound": torch.ones(2, 2)}
    encoded = parts.encode({"scent": torch.ones(2, 2)}, ["sound", "scent"], [], noise, moments)
    assert torch.equal(encoded.latents["sound"], torch.full((2, 2), 4.0))
    assert parts.vaes["sound"].calls == []
    assert len(parts.vaes["scent"].calls) == 1
    # A context needs the sample itself.
    with pytest.raises(ValueError, match="no 'sound' in the batch"):
        parts.encode({}, ["sound"], ["sound"], noise, moments)


def test_a_vae_without_moments_takes_none_from_a_cache(toys):
    with pytest.raises(ConfigError, match=r"data\.latents=cached: model\.modalities\.sound\.vae .*; choose inline"):
        toys.encode({"sound": torch.ones(2, 2)}, ["sound"], [], None, {"sound": torch.ones(2, 2)})


def test_parts_stay_frozen_inside_a_model_in_training(toys):
    model = nn.ModuleList([toys]).train()
    assert not any(module.training for module in model[0].modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    samples = {"sound": torch.ones(64, 2)}
    encoded = toys.encode(samples, ["sound"], ["sound"])
    assert not encoded.latents["sound"].requires_grad
    assert torch.equal(encoded.contexts["sound"], torch.ones(64, 1, 2))


def test_outputs_can_enter_a_graph(toys):
    """Tensors of inference mode cannot be saved for a backward pass."""
    latents = toys.encode({"sound": torch.ones(2, 2)}, ["sound"], []).latents["sound"]
    weight = torch.ones(2, requires_grad=True)
    (latents * weight).sum().backward()
    assert weight.grad is not None


def test_unknown_modalities_and_missing_samples_are_named(toys):
    with pytest.raises(ValueError, match="modality 'taste' has no frozen parts; the model has sound, scent"):
        toys.latent_shape("taste", (8, 8))
    with pytest.raises(ValueError, match="no 'scent' in the batch, only sound"):
        toys.encode({"sound": torch.ones(1)}, ["sound"], ["scent"])


def test_the_tiny_preset_encodes_a_batch_of_pairs():
    parts = FrozenParts({name: (tiny(name, "vae"), tiny(name, "context_encoder")) for name in ("image", "text")})
    _, images, captions = fresh(8, 64)
    samples = {"image": images, "text": captions}
    shapes = {name: torch.Size((8, *parts.latent_shape(name, (64, 64)))) for name in samples}
    encoded = parts.encode(samples, samples, samples, {"image": normal(shapes["image"])})
    assert {name: value.shape for name, value in encoded.latents.items()} == shapes
    for name, context in encoded.contexts.items():
        assert context.shape == parts.unconditional(Flow("image", name), 8).shape
    assert parts.decode("image", encoded.latents["image"]).shape == images.shape
    written = parts.decode("text", encoded.latents["text"], [torch.Generator().manual_seed(row) for row in range(8)])
    assert len(written) == 8


def test_samples_prepared_beforehand_encode_to_the_same():
    """This also holds for the micro-batches of a prepared batch."""
    parts = FrozenParts({name: (tiny(name, "vae"), tiny(name, "context_encoder")) for name in ("image", "text")})
    _, images, captions = fresh(8, 64)
    samples = {"image": images, "text": captions}
    noise = {"image": normal(torch.Size((8, *parts.latent_shape("image", (64, 64)))))}
    plain = parts.encode(samples, samples, samples, noise)
    prepared = parts.prepare(samples, samples, samples)
    assert isinstance(prepared["text"], Prepared)
    assert prepared["image"] is images
    whole = parts.encode(prepared, samples, samples, noise)
    cut = parts.encode({name: batch[2:5] for name, batch in prepared.items()}, ["text"], samples)
    for name in samples:
        assert torch.equal(whole.latents[name], plain.latents[name])
        assert torch.equal(whole.contexts[name], plain.contexts[name])
        assert torch.allclose(cut.contexts[name], plain.contexts[name][2:5], atol=1e-5)
    assert torch.allclose(cut.latents["text"], plain.latents["text"][2:5], atol=1e-5)


def test_shared_weights_are_held_once_in_a_model_and_not_between_models():
    model = to_object(compose("train", ["model=tiny"]), TrainConfig).model
    parts, others = build_frozen(model), build_frozen(model)
    held = sum(parameter.numel() for parameter in parts.parameters())
    alone = [tiny("image", "vae"), tiny("text", "vae"), tiny("image", "context_encoder")]
    assert held == sum(parameter.numel() for part in alone for parameter in part.parameters())
    others.to(torch.bfloat16)
    assert {parameter.dtype for parameter in parts.parameters()} == {torch.float32}
