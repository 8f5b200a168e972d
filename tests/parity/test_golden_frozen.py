"""The frozen parts against reference tensors of the original modules (random weights, float32)."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from vdtrain.models.clip import ClipImageContext, build_clip
from vdtrain.models.clip import ClipTextContext as TextContext
from vdtrain.models.image_vae import ImageVAE
from vdtrain.models.optimus import Optimus
from vdtrain.weights.frozen_names import to_open_clip

GOLDEN = Path(os.environ.get("VDTRAIN_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
TOLERANCE = 1e-4

pytestmark = [
    pytest.mark.skipif(
        not (GOLDEN / "optimus_tiny.pt").is_file(), reason=f"no reference tensors in {GOLDEN} (set VDTRAIN_GOLDEN)"
    ),
    pytest.mark.usefixtures("no_gradients"),
]


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def golden(name: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    if "state_dict" in content:
        content["state_dict"] = {key: value.float() for key, value in content["state_dict"].items()}
    return content


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() < TOLERANCE


@pytest.fixture(scope="module")
def autoencoder() -> tuple[ImageVAE, dict[str, Any]]:
    reference = golden("autokl_tiny")
    sizes = reference["config"]["ddconfig"]
    vae = ImageVAE(
        block_out_channels=[sizes["ch"] * factor for factor in sizes["ch_mult"]],
        layers_per_block=sizes["num_res_blocks"],
        latent_channels=sizes["z_channels"],
        norm_num_groups=32,
        latent_scale=1.0,
    ).eval()
    # The converter looks for a leading prefix that checkpoints of the whole model have.
    state = {f"first_stage_model.{key}": value for key, value in reference["state_dict"].items()}
    vae.model.load_state_dict(convert_ldm_vae_checkpoint(state, dict(vae.model.config)))
    return vae, reference


def test_image_vae_posterior(autoencoder):
    vae, reference = autoencoder
    mean, std = vae.posterior(2 * reference["x"] - 1)
    close(mean, reference["mean"])
    close(std, reference["std"])
    close(mean + std * reference["z_noise"], reference["z_sample"])
    close(vae.posterior(2 * reference["x_nonsquare"] - 1)[0], reference["mean_nonsquare"])


def test_image_vae_decoder(autoencoder):
    vae, reference = autoencoder
    close((vae.reconstruct(reference["z_in"]) + 1) / 2, reference["decoded_raw"])
    images = vae.decode(reference["z_in"]).float() / 255
    assert (images - reference["decoded_clamped"]).abs().max().item() <= 0.5 / 255 + TOLERANCE


@pytest.fixture(scope="module")
def optimus() -> tuple[Optimus, dict[str, Any]]:
    reference = golden("optimus_tiny")
    bert, gpt2 = reference["bert_config"], reference["gpt2_config"]
    model = Optimus(
        latent_size=gpt2["latent_size"],
        encoder_width=bert["hidden_size"],
        encoder_layers=bert["num_hidden_layers"],
        encoder_heads=bert["num_attention_heads"],
        encoder_feed_forward=bert["intermediate_size"],
        encoder_positions=bert["max_position_embeddings"],
        encoder_vocabulary=bert["vocab_size"],
        decoder_width=gpt2["n_embd"],
        decoder_layers=gpt2["n_layer"],
        decoder_heads=gpt2["n_head"],
        decoder_positions=gpt2["n_positions"],
        decoder_vocabulary=gpt2["vocab_size"],
    ).eval()
    # Causal masks are constants that the original kept among its weights.
    state = {key: value for key, value in reference["state_dict"].items() if not key.endswith(".attn.bias")}
    model.load_state_dict(state)
    return model, reference


def test_optimus_encoder(optimus):
    model, reference = optimus
    mean, log_variance = model.posterior(reference["input_ids"])
    close(mean, reference["mu"])
    close(mean, reference["encode"])
    close(log_variance, reference["logvar"])


def test_optimus_decoder_logits_and_reconstruction(optimus):
    model, reference = optimus
    close(model.logits(reference["dec_ids"], reference["z"]), reference["logits"])
    pad = reference["special"]["pad"][0]
    close(model.reconstruction(reference["dec_ids"], reference["z"], pad), reference["loss_rec"])


def test_optimus_logits_with_a_cache_are_those_without(optimus):
    model, reference = optimus
    cache = model.memory(reference["z"])
    steps = [model.logits(ids[:, None], reference["z"], cache) for ids in reference["dec_ids"].T]
    close(torch.cat(steps, dim=1), reference["logits"])


def test_optimus_greedy_decoding(optimus, monkeypatch):
    model, reference = optimus
    expected = reference["greedy12"]
    monkeypatch.setattr(model, "max_length", expected.shape[1] + 1)
    special = reference["special"]
    ids = model.generate(reference["z"], special["bos"][0], special["eos"][0])
    assert torch.equal(ids[:, :-1], expected)


def test_optimus_logits_give_the_reference_samples(optimus):
    """The reference drew each id from the whole distribution with the global generator, without a cache."""
    model, reference = optimus
    sampled = reference["sampled_seed9_ids"]
    probabilities = model.logits(sampled[None, :-1], reference["z"][:1])[0].softmax(dim=-1)
    generator = torch.Generator().manual_seed(9)
    drawn = [int(torch.multinomial(row, 1, generator=generator)) for row in probabilities[:-1]]
    assert drawn == sampled[1:-1].tolist()


@pytest.mark.parametrize(("mode", "name"), [(0, "none"), (1, "mask"), (2, "deterministic")])
def test_optimus_loss(optimus, mode, name):
    model, reference = optimus
    expected = reference["vae_loss"][mode]
    mean, log_variance = model.posterior(reference["input_ids"][:3])
    loss = model.loss_of(
        mean,
        log_variance,
        reference["dec_ids"],
        reference["special"]["pad"][0],
        expected["eps"][:, 0],
        beta=1.0,
        free_bits=name,
        target_divergence=0.5,
    )
    close(loss.reconstruction, expected["rec"])
    close(loss.divergence, expected["kl"])
    close(loss.total, expected["loss"])


@pytest.fixture(scope="module")
def clip() -> tuple[TextContext, ClipImageContext, dict[str, Any]]:
    reference = golden("clip_tiny")
    text_sizes, vision_sizes = reference["config"]["text_config"], reference["config"]["vision_config"]
    architecture = {
        "embed_dim": reference["config"]["projection_dim"],
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": vision_sizes["image_size"],
            "patch_size": vision_sizes["patch_size"],
            "width": vision_sizes["hidden_size"],
            "layers": vision_sizes["num_hidden_layers"],
            "head_width": vision_sizes["hidden_size"] // vision_sizes["num_attention_heads"],
            "mlp_ratio": vision_sizes["intermediate_size"] / vision_sizes["hidden_size"],
        },
        "text_cfg": {
            "context_length": text_sizes["max_position_embeddings"],
            "vocab_size": text_sizes["vocab_size"],
            "width": text_sizes["hidden_size"],
            "heads": text_sizes["num_attention_heads"],
            "layers": text_sizes["num_hidden_layers"],
            "mlp_ratio": text_sizes["intermediate_size"] / text_sizes["hidden_size"],
        },
    }
    model = build_clip(architecture, None).eval()
    model.load_state_dict(to_open_clip(reference["state_dict"]))
    image = ClipImageContext(architecture)
    image.clip = model
    # Its vocabulary of 100 ids has no tokenizer.
    text = TextContext.__new__(TextContext)
    torch.nn.Module.__init__(text)
    text.clip = model
    return text, image, reference


def test_clip_text_context(clip):
    text, _, reference = clip
    close(text.encode_ids(reference["input_ids"]), reference["text_context"])


def test_clip_image_context(clip):
    _, image, reference = clip
    close(image.encode_pixels(reference["pixel_values"].float()), reference["image_context"])


def test_clip_image_context_with_masks(clip):
    _, image, reference = clip
    masks = reference["masks"].float()
    close(image.encode_pixels(reference["pixel_values"].float(), masks), reference["image_context_masked"])
    plain = image.encode_pixels(reference["pixel_values"].float(), torch.ones_like(masks))
    close(plain, reference["image_context"])


def test_clip_preprocessing(clip):
    _, image, _ = clip
    reference = golden("clip_preprocess")
    drawn = reference["uint8"].permute(2, 0, 1)[None]
    close(image.preprocess(drawn), reference["pixel_values"])
