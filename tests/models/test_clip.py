"""CLIP contexts: tokens, normalisation, sharing, and the quality of the tiny preset's trained weights."""

from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import pre_tokenizers
from torch import Tensor

from miniature.corpus import scene_facts
from miniature.shapes import COLOURS, SHAPES
from tests.models.tiny import arguments, fresh, tiny
from vdtrain.models.clip import ClipImageContext, ClipTextContext, build_clip
from vdtrain.models.frozen_weights import WeightsError, locate, shared_loading
from vdtrain.models.tokenizers import ClipTokenizer, released_tokenizer

WHOLE, ONE_BY_ONE = released_tokenizer(), ClipTokenizer(None, 40)
COUNT, TRAINED = 1200, 800
"""Number of samples, and how many of them train a probe."""


@pytest.fixture
def text() -> ClipTextContext:
    return tiny("text", "context_encoder")


@pytest.fixture
def image() -> ClipImageContext:
    return tiny("image", "context_encoder")


def architecture() -> dict:
    return arguments("tiny", "image", "context_encoder")["architecture"]


def pooled(text: ClipTextContext, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Contexts and their end-of-text tokens."""
    contexts = text.encode(captions)
    return contexts, contexts[torch.arange(len(captions)), text.tokenizer(captions).argmax(dim=-1)]


def probe(features: Tensor, labels: Tensor) -> float:
    """Accuracy of a ridge regression onto the labels, on held-out samples."""
    inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    wanted = torch.nn.functional.one_hot(labels).double()
    seen, targets = inputs[:TRAINED], wanted[:TRAINED]
    solution = torch.linalg.solve(seen.T @ seen + 1e-3 * torch.eye(seen.shape[1]).double(), seen.T @ targets)
    found = (inputs[TRAINED:] @ solution).argmax(dim=1)
    return (found == labels[TRAINED:]).double().mean().item()


def test_released_vocabulary_gives_open_clips_ids():
    captions = [
        "",
        "A Red Car, parked near the beach: 4k!",
        "it's snowing; don't drive 123 miles",
        "  two   spaces\tand\nlines",
        "Émile Zola's café 🎉 日本語",
        "x " * 100,
        "photo-of_a-dog.jpg (2019) #cute @home",
    ]
    ids, expected = ClipTokenizer(None, 77)(captions), open_clip.get_tokenizer("ViT-L-14")(captions)
    assert ids.shape == (7, 77)
    for row, other in zip(ids, expected, strict=True):
        end = int(other.argmax())
        assert torch.equal(row[: end + 1], other[: end + 1])
        assert row[end:].eq(49_407).all()


@given(st.lists(st.text(st.sampled_from("aBé\u0301İςΣ한1९'s,!<|> \t\n\u00a0\u3000\x1c日🎉"), max_size=60), max_size=4))
def test_words_one_by_one_have_the_ids_of_the_whole_caption(captions: list[str]) -> None:
    expected = []
    for caption in captions:
        kept = WHOLE.encode(caption, add_special_tokens=False).ids[:38]
        expected.append([49_406, *kept, *[49_407] * (39 - len(kept))])
    for _ in range(2):  # the second time from the cache
        assert ONE_BY_ONE(captions).tolist() == expected


def test_a_tokenizer_that_joins_words_is_refused(tmp_path: Path) -> None:
    joining = released_tokenizer()
    joining.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    joining.save(str(tmp_path / "joining.json"))
    with pytest.raises(WeightsError, match="joins words across spaces"):
        ClipTokenizer(str(tmp_path / "joining.json"), 77)


def test_both_contexts_share_one_model_where_they_are_loaded_together(text, image, tmp_path):
    assert text.clip is not image.clip
    with shared_loading():
        one, other = (build_clip(architecture(), "asset:tiny/clip.safetensors") for _ in range(2))
    assert one is other
    # Other weights are another model.
    elsewhere = tmp_path / "clip.safetensors"
    elsewhere.write_bytes(locate("asset:tiny/clip.safetensors", "weights").read_bytes())
    with shared_loading():
        one, other = (build_clip(architecture(), name) for name in ("asset:tiny/clip.safetensors", str(elsewhere)))
    assert one is not other
    assert build_clip(architecture(), None) is not build_clip(architecture(), None)


def test_contexts_have_a_global_token_of_length_one(text, image):
    _, images, captions = fresh(16, 64)
    contexts, ends = pooled(text, captions)
    assert contexts.shape == (16, 24, 64)
    torch.testing.assert_close(ends.norm(dim=-1), torch.ones(16))
    assert contexts.norm(dim=-1).std() > 0.01
    seen = image.encode(images)
    assert seen.shape == (16, 17, 64)
    torch.testing.assert_close(seen[:, 0].norm(dim=-1), torch.ones(16))
    assert seen.norm(dim=-1).std() > 0.01


def test_global_tokens_are_open_clips_features(text, image):
    _, images, captions = fresh(8, 32)
    features = text.clip.encode_text(text.tokenizer(captions), normalize=True)
    torch.testing.assert_close(pooled(text, captions)[1], features, atol=1e-5, rtol=1e-4)
    seen = image.clip.encode_image(image.preprocess(images), normalize=True)
    torch.testing.assert_close(image.encode(images)[:, 0], seen)


def test_encoding_is_deterministic_and_does_not_depend_on_the_batch(text, image):
    _, images, captions = fresh(8, 64)
    for encoder, samples in ((text, captions), (image, images)):
        together = encoder.encode(samples)
        assert torch.equal(together, encoder.encode(samples))
        alone = torch.cat([encoder.encode(samples[index : index + 1]) for index in range(8)])
        assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 48), (40, 80), (20, 20)])
def test_preprocessing_is_pillows_bicubic_and_a_cut_from_the_middle(image, height, width):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    scale = 32 / min(height, width)
    size = (round(width * scale), round(height * scale))
    resized = Image.fromarray(drawn.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    expected = open_clip.image_transform(32, is_train=False)(resized.crop((left, top, left + 32, top + 32)))
    assert (image.preprocess(drawn[None])[0] - expected).abs().max() < 1.01 / 255 / 0.26


def test_unconditional_contexts(text, image):
    assert torch.equal(text.unconditional(3, "image"), text.encode([""]).expand(3, -1, -1))
    assert torch.equal(image.unconditional(2, "image"), torch.zeros(2, 17, 64))
    black = ClipImageContext(architecture(), weights="asset:tiny/clip.safetensors", blank="black")
    assert black.clip is not image.clip
    drawn = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    torch.testing.assert_close(black.unconditional(2, "text")[1:], image.encode(drawn))
    grey = ClipImageContext(architecture(), weights="asset:tiny/clip.safetensors", blank="grey")
    torch.testing.assert_close(grey.unconditional(1, "text"), image.encode(torch.full_like(drawn, 127)))
    mixed = ClipImageContext(architecture(), weights="asset:tiny/clip.safetensors", blank_for={"text": "black"})
    assert torch.equal(mixed.unconditional(2, "text"), black.unconditional(2, "text"))
    assert torch.equal(mixed.unconditional(2, "image"), torch.zeros(2, 17, 64))
    with pytest.raises(ValueError, match="blank=white: choose one of zeros, black, grey"):
        ClipImageContext(architecture(), blank="white")


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="architecture=ViT-Q-7: not a model of open_clip"):
        build_clip("ViT-Q-7", None)
    with pytest.raises(ValueError, match=r"architecture: .*unexpected keyword argument 'colour'"):
        build_clip({**architecture(), "colour": 1}, None)
    with pytest.raises(ValueError, match="image encoder is not a vision transformer"):
        build_clip("RN50", None)
    with pytest.raises(ValueError, match=r"vocab_size=629: the tokenizer of CLIP has 49408 entries; set vocab_size"):
        ClipTextContext(architecture())


def test_full_size_arguments_build_vit_l_14():
    full = arguments("versatile_diffusion", "text", "context_encoder")
    with torch.device("meta"):
        clip = build_clip(full["architecture"], None)
    assert sum(parameter.numel() for parameter in clip.parameters()) == 427_616_513
    assert clip.context_length == 77
    assert clip.visual.positional_embedding.shape[0] == 257


@pytest.mark.parametrize("pixels", [32, 64])
def test_images_find_their_captions(text, image, pixels):
    scenes, images, _ = fresh(COUNT, pixels)
    captions = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    facts = scene_facts(scenes)
    wanted = facts[:, 0] * len(SHAPES) + facts[:, 1]
    found = (image.encode(images)[:, 0] @ pooled(text, captions)[1].T).argmax(dim=1)
    assert (found == wanted).double().mean() >= 0.97


@pytest.mark.parametrize("pixels", [32, 64])
@pytest.mark.parametrize("fact", [0, 1])
def test_colour_and_shape_can_be_read_from_image_contexts(image, pixels, fact):
    scenes, images, _ = fresh(COUNT, pixels)
    contexts, labels = image.encode(images), scene_facts(scenes)[:, fact]
    assert probe(contexts[:, 0], labels) >= 0.98
    assert probe(contexts.mean(dim=1), labels) >= 0.98


@pytest.mark.parametrize("fact", [0, 1])
def test_colour_and_shape_can_be_read_from_text_contexts(text, fact):
    scenes, _, captions = fresh(COUNT, 32)
    contexts, ends = pooled(text, captions)
    labels = scene_facts(scenes)[:, fact]
    assert probe(ends, labels) >= 0.98
    assert probe(contexts.mean(dim=1), labels) >= 0.98
