"""CLIP scores with the tiny preset's CLIP, which knows drawn shapes. 5 seconds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from miniature.shapes import caption, draw, sample_scene
from vdtrain.config.command_schema import ClipConfig
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.evaluation.distances import Statistics
from vdtrain.evaluation.scores import CLIP, ClipScorer, Mean, check_clip, clip_scores, distances, in_batches
from vdtrain.flows import Flow
from vdtrain.models.frozen import build_frozen

OWN = ClipConfig(None, None, None)
WEIGHTS = "asset:tiny/clip.safetensors"


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return to_object(compose("train", ["model=tiny"]), TrainConfig).model


@pytest.fixture(scope="module")
def scorer(model: ModelConfig) -> ClipScorer:
    return ClipScorer(OWN, model)


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, list[str]]:
    generator = np.random.default_rng(7)
    scenes = [sample_scene(generator) for _ in range(40)]
    drawn = torch.from_numpy(np.stack([draw(scene, 48) for scene in scenes])).permute(0, 3, 1, 2).contiguous()
    return drawn, [caption(scene, generator) for scene in scenes]


def test_right_captions_score_above_wrong_ones(scorer: ClipScorer, pairs: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = scorer.embed_images(pairs[0]), scorer.embed_captions(pairs[1])
    right = clip_scores(images, captions)
    wrong = clip_scores(images, captions.roll(1, dims=0))
    assert right.mean() > wrong.mean() + 20
    assert (right > wrong).double().mean() >= 0.9


def test_no_network_that_measures_rounds_to_tf32() -> None:
    before, seen = torch.backends.cudnn.allow_tf32, []

    def network(samples: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return samples

    assert len(in_batches(network, torch.zeros(70, 2))) == 70
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_the_error_of_a_mean_is_its_values_deviation_over_the_root_of_their_number() -> None:
    found = Mean.of(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
    assert (found.mean, found.standard_error) == pytest.approx((3.0, (14 / 3) ** 0.5 / 2))


def test_precision_and_recall_are_those_of_the_generated() -> None:
    """All generated samples lie among the real ones, of which most have no generated one near."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(60, 4, generator=generator)
    generated = 0.1 * torch.randn(60, 4, generator=generator)
    statistics = {CLIP: Statistics.of(real)}
    found = distances(Flow.parse("text-to-image"), {CLIP: generated}, statistics, {CLIP: real})
    assert found["clip_precision"] > 0.9
    assert found["clip_recall"] < 0.5


def test_the_scale_is_hundredths_of_a_cosine_and_nothing_below_zero() -> None:
    first = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[5.0, 0.0], [3.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(clip_scores(first, second), torch.tensor([100.0, 60.0, 0.0, 0.0]).double())


def test_embeddings_are_the_global_tokens_of_the_contexts(
    scorer: ClipScorer, model: ModelConfig, pairs: tuple[torch.Tensor, list[str]]
) -> None:
    frozen = build_frozen(model)
    contexts = frozen.encode({"image": pairs[0], "text": pairs[1]}, (), ("image", "text")).contexts
    normalised = torch.nn.functional.normalize(scorer.embed_images(pairs[0]), dim=-1)
    torch.testing.assert_close(normalised, contexts["image"][:, 0], atol=1e-5, rtol=1e-4)
    # One token of a caption's context, the one that ends it, is its embedding.
    embedded = torch.nn.functional.normalize(scorer.embed_captions(pairs[1]), dim=-1)
    apart = (contexts["text"] - embedded[:, None]).norm(dim=-1).min(dim=1).values
    torch.testing.assert_close(apart, torch.zeros(40), atol=1e-4, rtol=0)


def test_a_clip_of_its_own_scores_as_the_same_one_in_the_model(
    scorer: ClipScorer, model: ModelConfig, pairs: tuple[torch.Tensor, list[str]]
) -> None:
    architecture = model.modalities["text"].context_encoder["architecture"]
    named = ClipScorer(ClipConfig(architecture, WEIGHTS, "asset:tiny/clip_tokenizer.json"), model)
    assert torch.equal(named.embed_images(pairs[0]), scorer.embed_images(pairs[0]))
    assert torch.equal(named.embed_captions(pairs[1]), scorer.embed_captions(pairs[1]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ClipConfig("ViT-B-32-quickgelu", None, None), "clip.weights: null"),
        (ClipConfig("ViT-B-32-quickgelu", "nowhere.safetensors", None), "clip.weights=nowhere.safetensors: no such"),
        (ClipConfig(None, WEIGHTS, None), "need clip.architecture, which is null"),
    ],
)
def test_a_clip_that_cannot_be_built_is_one_line(config: ClipConfig, message: str, model: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        check_clip(config, model)


def test_wrong_weights_and_names_are_one_line(model: ModelConfig) -> None:
    for architecture, message in (
        ("ViT-Z", r"clip\.architecture=ViT-Z: not a model of open_clip"),
        (
            {**model.modalities["text"].context_encoder["architecture"], "embed_dim": 32},
            r"clip\.weights=.*weights of another model",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            ClipScorer(ClipConfig(architecture, WEIGHTS, "asset:tiny/clip_tokenizer.json"), model)


def test_a_model_without_clip_needs_one_named() -> None:
    model = to_object(compose("train", ["model=tiny"]), TrainConfig).model
    model.modalities["image"].context_encoder = {"_target_": "torch.nn.Identity"}
    with pytest.raises(ConfigError, match=r"context_encoder is not a ClipImageContext; name a CLIP"):
        check_clip(OWN, model)
