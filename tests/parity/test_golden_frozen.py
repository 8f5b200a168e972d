"""The frozen parts against what the original modules gave (random weights, float32; reference/README.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.parity.recorded import drawn, drawn_weights, recorded

# Each of these imports a library of its own, for seconds: fixtures import what they need.
if TYPE_CHECKING:
    from vdtrain.models.clip import ClipImageContext, ClipTextContext
    from vdtrain.models.image_vae import ImageVAE
    from vdtrain.models.optimus import Optimus

TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def state_of(reference: dict[str, Any]) -> dict[str, Tensor]:
    """The original's weights, which are kept as float16 without loss."""
    return {key: value.float() for key, value in reference["state_dict"].items()}


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() < TOLERANCE


@pytest.fixture(scope="module")
def autoencoder() -> tuple[ImageVAE, dict[str, Any]]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    from vdtrain.models.image_vae import ImageVAE

    reference = recorded("autokl")
    sizes = reference["config"]
    vae = ImageVAE(
        block_out_channels=[sizes["ch"] * factor for factor in sizes["ch_mult"]],
        layers_per_block=sizes["num_res_blocks"],
        latent_channels=sizes["z_channels"],
        norm_num_groups=32,
        latent_scale=1.0,
    ).eval()
    # The converter looks for a leading prefix that checkpoints of the whole model have.
    state = {f"first_stage_model.{key}": value for key, value in state_of(reference).items()}
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
    assert (images - reference["decoded_raw"].clamp(0, 1)).abs().max().item() <= 0.5 / 255 + TOLERANCE


@pytest.fixture(scope="module")
def optimus() -> tuple[Optimus, dict[str, Any]]:
    from vdtrain.models.optimus import Optimus

    reference = recorded("optimus")
    model = Optimus(**reference["sizes"]).eval()
    model.load_state_dict(state_of(reference))
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
    pad = reference["special"]["pad"]
    close(model.reconstruction(reference["dec_ids"], reference["z"], pad), reference["loss_rec"])


def test_optimus_logits_with_a_cache_are_those_without(optimus):
    model, reference = optimus
    cache = model.memory(reference["z"])
    steps = [model.logits(ids[:, None], reference["z"], cache) for ids in reference["dec_ids"].T]
    close(torch.cat(steps, dim=1), reference["logits"])


def test_optimus_greedy_decoding(optimus, monkeypatch):
    model, reference = optimus
    expected = reference["greedy"]
    monkeypatch.setattr(model, "max_length", expected.shape[1] + 1)
    special = reference["special"]
    ids = model.generate(reference["z"], special["bos"], special["eos"])
    assert torch.equal(ids[:, :-1], expected)


def test_optimus_logits_give_the_reference_samples(optimus):
    """torch.multinomial takes the largest probability after a division by exponential noise, which is recorded."""
    model, reference = optimus
    sampled = reference["sampled"]
    probabilities = model.logits(sampled[None, :-1], reference["z"][:1])[0].softmax(dim=-1)
    assert torch.equal((probabilities[:-1] / reference["sample_noise"]).argmax(dim=-1), sampled[1:-1])


@pytest.mark.parametrize(("mode", "name"), [(0, "none"), (1, "mask"), (2, "deterministic")])
def test_optimus_loss(optimus, mode, name):
    model, reference = optimus
    expected = reference["vae_loss"][str(mode)]
    mean, log_variance = model.posterior(reference["input_ids"][:3])
    loss = model.loss_of(
        mean,
        log_variance,
        reference["dec_ids"],
        reference["special"]["pad"],
        expected["eps"],
        beta=1.0,
        free_bits=name,
        target_divergence=0.5,
    )
    close(loss.reconstruction, expected["rec"])
    close(loss.divergence, expected["kl"])
    close(loss.total, expected["loss"])


@pytest.fixture(scope="module")
def clip() -> tuple[ClipTextContext, ClipImageContext, dict[str, Any]]:
    from vdtrain.models.clip import ClipImageContext, ClipTextContext, build_clip
    from vdtrain.weights.published.frozen_names import to_open_clip

    reference = recorded("clip")
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
    model.load_state_dict(to_open_clip(drawn_weights(reference["shapes"], reference["sha256"])))
    image = ClipImageContext(architecture)
    image.clip = model
    # Its vocabulary of 100 ids has no tokenizer.
    text = ClipTextContext.__new__(ClipTextContext)
    torch.nn.Module.__init__(text)
    text.clip = model
    reference["pixel_values"] = 2 * drawn("pixel_values", (2, 3, 224, 224)).float()
    return text, image, reference


def test_clip_text_context(clip):
    text, _, reference = clip
    close(text.encode_ids(reference["input_ids"]), reference["text_context"])


def test_clip_image_context(clip):
    _, image, reference = clip
    close(image.encode_pixels(reference["pixel_values"]), reference["image_context"])


def test_clip_image_context_with_masks(clip):
    _, image, reference = clip
    masks = reference["masks"].float()
    close(image.encode_pixels(reference["pixel_values"], masks), reference["image_context_masked"])
    plain = image.encode_pixels(reference["pixel_values"], torch.ones_like(masks))
    close(plain, reference["image_context"])


def test_clip_preprocessing(clip):
    _, image, _ = clip
    reference = recorded("clip_preprocess")
    mean, deviation = (torch.tensor(reference[name]).view(3, 1, 1) for name in ("mean", "deviation"))
    expected = (reference["resized"].float() / 255 - mean) / deviation
    close(image.preprocess(reference["image"][None]), expected[None])
