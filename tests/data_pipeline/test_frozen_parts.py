"""The command that rebuilds the tiny frozen parts, with a few steps instead of thousands."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from miniature import frozen as frozen_parts
from miniature.corpus import caption_facts, sample_scenes, scene_facts, write_captions
from miniature.shapes import HELD_OUT
from miniature.training import standardise_images, standardise_text
from vdtrain.models.image_vae import ImageVAE
from vdtrain.models.optimus import Optimus


def rebuild(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["frozen_parts", *options])
    threads = torch.get_num_threads()
    try:
        frozen_parts.main()
    finally:
        torch.set_num_threads(threads)


def test_one_part_is_rebuilt_alike_and_loads(monkeypatch, tmp_path, capsys):
    states = []
    for name in ("a", "b"):
        folder = tmp_path / name
        options = ("--only", "optimus", "--steps", "2", "--threads", "1", "--folder", str(folder))
        rebuild(monkeypatch, *options)
        states.append(load_file(folder / "optimus.safetensors"))
        assert not (folder / "clip.safetensors").exists()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert "optimus.safetensors: 0." in capsys.readouterr().out
    model: Optimus = frozen_parts.untrained(
        "text",
        "vae",
        weights=str(tmp_path / "a" / "optimus.safetensors"),
        encoder_tokenizer=str(tmp_path / "a" / frozen_parts.ENCODER_TOKENIZER),
    )
    assert model.encode(["a red circle"]).shape == (1, 64)


def test_tokenizers_of_the_package_are_those_that_the_command_makes(tmp_path):
    frozen_parts.write_tokenizers(tmp_path, seed=0)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (frozen_parts.FOLDER / file.name).read_bytes()


def test_standardised_image_latents_decode_as_before():
    torch.manual_seed(0)
    vae: ImageVAE = frozen_parts.untrained("image", "vae").eval().requires_grad_(False)
    pixels = torch.rand(16, 3, 32, 32) * 2 - 1
    mean, std = vae.posterior(pixels)
    before = vae.reconstruct(mean + std)
    standardise_images(vae, pixels)
    mean, std = vae.posterior(pixels)
    torch.testing.assert_close(vae.reconstruct(mean + std), before, atol=1e-4, rtol=1e-3)
    scale = vae.latent_scale
    torch.testing.assert_close(scale * mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    spread = (mean.square() + std.square()).mean(dim=(0, 2, 3)).sqrt()
    torch.testing.assert_close(scale * spread, torch.ones(4), atol=1e-4, rtol=0)


def test_standardised_text_latents_decode_as_before():
    torch.manual_seed(0)
    tokenizer = str(frozen_parts.FOLDER / frozen_parts.ENCODER_TOKENIZER)
    vae: Optimus = frozen_parts.untrained("text", "vae", encoder_tokenizer=tokenizer).eval().requires_grad_(False)
    captions, ids = ["a red circle", "the star is blue and small"], torch.tensor([[1, 2, 3], [4, 5, 6]])
    before = vae.logits(ids, vae.encode(captions))
    standardise_text(vae, captions)
    latents = vae.encode(captions)
    torch.testing.assert_close(latents.square().mean(dim=0), torch.ones(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.logits(ids, latents), before, atol=1e-4, rtol=1e-3)


def test_corpus_holds_all_combinations_and_true_captions():
    rng = np.random.default_rng(0)
    scenes = sample_scenes(2000, rng)
    assert {(scene.colour, scene.shape) for scene in scenes} >= HELD_OUT
    stated = caption_facts(write_captions(scenes, rng))
    assert bool(((stated == scene_facts(scenes)) | (stated < 0)).all())
    assert bool((stated[:, :2] >= 0).all())
