"""The image VAE: shapes and scales, and the quality of the tiny preset's trained weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import arguments, fresh, image_accuracy, normal, tiny
from vdtrain.models.frozen_weights import ASSETS, WeightsError
from vdtrain.models.image_vae import ImageVAE

SMALL = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}


@pytest.fixture
def vae() -> ImageVAE:
    return tiny("image", "vae")


def test_latent_shape_is_an_eighth(vae):
    assert vae.latent_shape((64, 64)) == (4, 8, 8)
    assert vae.latent_shape((512, 256)) == (4, 64, 32)


def test_resolution_off_the_grid_is_refused(vae):
    with pytest.raises(ValueError, match=r"size=\(64, 60\): must be multiples of 8"):
        vae.latent_shape((64, 60))


def test_groups_that_do_not_divide_the_widths_are_refused():
    with pytest.raises(ValueError, match="norm_num_groups=3 does not divide"):
        ImageVAE(**{**SMALL, "norm_num_groups": 3})


def test_noise_moves_the_latent_by_the_posterior_deviation(vae):
    _, images, _ = fresh(4, 32)
    mean, latents = vae.encode(images), vae.encode(images, torch.ones(4, 4, 4, 4))
    _, std = vae.posterior(images.float() / 127.5 - 1)
    torch.testing.assert_close(latents - mean, std * vae.latent_scale, atol=1e-5, rtol=1e-4)


def test_images_keep_size_and_type_also_when_not_square(vae):
    images = torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
    latents = vae.encode(images)
    assert latents.shape == (2, 4, 4, 6)
    decoded = vae.decode(latents)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.uint8


def test_compute_follows_the_parameters():
    vae = ImageVAE(**SMALL).to(torch.bfloat16).eval().requires_grad_(False)
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    latents = vae.encode(images, torch.zeros(1, 4, 4, 4))
    assert latents.dtype == torch.bfloat16
    assert vae.decode(latents.float()).dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_is_the_draw_from_moments(dtype):
    """The results are bit-identical, and the variance is clamped."""
    vae = ImageVAE(**SMALL).to(dtype).eval().requires_grad_(False)
    _, images, _ = fresh(4, 32)
    noise = normal(torch.Size((4, 4, 4, 4)))
    moments = vae.moments(images)
    assert moments.shape == (4, 8, 4, 4)
    assert moments.dtype == dtype
    assert torch.equal(vae.from_moments(moments, noise), vae.encode(images, noise))
    assert torch.equal(vae.from_moments(moments), vae.encode(images))
    mean, logvar = moments.chunk(2, dim=1)
    expected = (mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise.to(dtype)) * vae.latent_scale
    assert torch.equal(vae.from_moments(moments, noise), expected)


def test_encoding_does_not_depend_on_the_batch(vae):
    _, images, _ = fresh(8, 64)
    together = vae.encode(images)
    assert torch.equal(together, vae.encode(images))
    alone = torch.cat([vae.encode(image[None]) for image in images])
    assert (together - alone).abs().max() < 1e-5


def test_yaml_arguments_and_weights_rebuild_the_same_model(vae):
    again = ImageVAE(**{key: value for key, value in arguments("tiny", "image", "vae").items() if key != "_target_"})
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))


def test_full_size_arguments_build_kl_f8():
    full = {key: value for key, value in arguments("versatile_diffusion", "image", "vae").items() if key != "_target_"}
    with torch.device("meta"):
        vae = ImageVAE(**{**full, "weights": None})
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    assert vae.latent_shape((256, 256)) == (4, 32, 32)


@pytest.mark.parametrize(
    ("pixels", "colour", "shape"),
    [(32, 0.96, 0.92), (64, 0.98, 0.95)],
)
def test_reconstructions_keep_colour_and_shape(vae, pixels, colour, shape):
    scenes, images, _ = fresh(256, pixels)
    found = image_accuracy(vae.decode(vae.encode(images)), scenes)
    assert found[0] >= colour
    assert found[1] >= shape


@pytest.mark.parametrize(("pixels", "colour", "shape"), [(32, 0.95, 0.88), (64, 0.97, 0.93)])
def test_decoding_tolerates_noise(vae, pixels, colour, shape):
    scenes, images, _ = fresh(256, pixels)
    latents = vae.encode(images)
    found = image_accuracy(vae.decode(latents + 0.15 * normal(latents.shape)), scenes)
    assert found[0] >= colour
    assert found[1] >= shape


@pytest.mark.parametrize("pixels", [32, 64])
def test_latents_have_unit_deviation(vae, pixels):
    _, images, _ = fresh(256, pixels)
    latents = vae.encode(images, normal(torch.Size((256, *vae.latent_shape((pixels, pixels))))))
    assert latents.std().item() == pytest.approx(1.0, abs=0.15)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.3


def test_missing_weights_name_setting_and_remedy():
    with pytest.raises(WeightsError, match=r"vae\.weights=asset:tiny/no\.safetensors: no such file; .*make frozen"):
        ImageVAE(**SMALL, weights="asset:tiny/no.safetensors")


def test_truncated_and_foreign_weights_are_refused(tmp_path):
    whole = ASSETS / "tiny" / "image_vae.safetensors"
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        ImageVAE(**SMALL, weights=str(truncated))
    with pytest.raises(WeightsError, match=r"weights of another model: unexpected .* shape .* and \d+ more"):
        ImageVAE(**SMALL, weights=str(whole))
    state = load_file(whole)
    del state["quant_conv.weight"]
    save_file(state, tmp_path / "missing.safetensors")
    with pytest.raises(WeightsError, match=r"missing quant_conv\.weight"):
        ImageVAE(
            **{
                **{k: v for k, v in arguments("tiny", "image", "vae").items() if k != "_target_"},
                "weights": str(tmp_path / "missing.safetensors"),
            }
        )


def test_assets_are_small():
    assert sum(file.stat().st_size for file in (ASSETS / "tiny").iterdir()) <= 8_000_000
