"""An exported model sampled by diffusers' own pipelines against the same weights sampled by ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    VersatileDiffusionDualGuidedPipeline,
    VersatileDiffusionImageVariationPipeline,
    VersatileDiffusionPipeline,
    VersatileDiffusionTextToImagePipeline,
)
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor

from tests.parity.networks import NETWORK_TOLERANCE, accept_mask, assert_close, draw, randomise
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.diffusion.contexts import mixed
from vdtrain.diffusion.sampling import DDIM, Mixing, alone, denoise, guided
from vdtrain.diffusion.schedule import Schedule
from vdtrain.flows import Flow, active_groups, all_flows
from vdtrain.models.diffuser import Context, Diffuser
from vdtrain.models.frozen import FrozenParts, build_frozen
from vdtrain.weights.published.diffusers_folder import write_pipeline

MODEL: ModelConfig = to_object(compose("train", ["model=tiny"]), TrainConfig).model
CAPTIONS = ["a red circle on a white background", "A  BLUE star, isn't it?", "", "ünïcode 12 ☃ " * 9]
STEPS, SCALE, SIDE = 5, 7.5, 64


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def diffuser() -> Diffuser:
    return randomise(Diffuser(MODEL, active_groups(all_flows(MODEL.modalities)))).eval()


@pytest.fixture(scope="module")
def frozen() -> FrozenParts:
    return build_frozen(MODEL)


@pytest.fixture(scope="module")
def folder(diffuser: Diffuser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exported") / "tiny"
    write_pipeline(made, diffuser.state_dict(), MODEL)
    return made


def load(pipeline: Any, folder: Path) -> Any:
    loaded = pipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def drawn() -> list[Image.Image]:
    """Two drawn of other sizes than CLIP's, so that the way there counts."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 6, 9, 3), dtype=np.uint8)
    return [Image.fromarray(image).resize((90, 60), Image.Resampling.BICUBIC) for image in noise]


def as_tensor(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def sampled(
    diffuser: Diffuser, given: list[Context], without: list[Context], noise: Tensor, mixing: Mixing = alone
) -> Tensor:
    """Image latents by our sampler."""
    predict = guided(diffuser, "image", given, without, SCALE, mixing)
    return denoise(predict, noise, DDIM(Schedule(MODEL.schedule), STEPS))


def noise_for(rows: int) -> Tensor:
    return draw(rows, 4, SIDE // 8, SIDE // 8, seed=5)


def settings(noise: Tensor, output: str = "latent") -> dict[str, Any]:
    return {
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "latents": noise,
        "output_type": output,
    }


def assert_samples_close(found: Tensor, expected: Tensor) -> None:
    """Guidance and the divisions by sqrt(alpha) make values of up to 20, and rounding grows with them."""
    assert_close(found, expected, max(NETWORK_TOLERANCE, 1e-5 * float(expected.abs().max())))


def normalised(pixels: Tensor) -> Tensor:
    """Pixels 0..1 as CLIP takes them."""
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (pixels - mean) / deviation


def theirs_for_no_image(pipeline: Any) -> Tensor:
    both = pipeline._encode_prompt(drawn()[:1], "cpu", 1, True, None)
    return both[:1]


def test_text_contexts(folder: Path, frozen: FrozenParts) -> None:
    pipeline = load(VersatileDiffusionTextToImagePipeline, folder)
    ours = frozen.encode({"text": CAPTIONS}, (), ("text",)).contexts["text"]
    empty = frozen.unconditional(Flow("image", "text"), 1)
    # One by one: the pipeline cannot make a batch with a caption that it has to cut.
    for caption, context in zip(CAPTIONS, ours, strict=True):
        without, given = pipeline._encode_prompt([caption], "cpu", 1, True, None)
        assert_close(context, given, NETWORK_TOLERANCE)
        assert_close(empty[0], without, NETWORK_TOLERANCE)


def test_image_contexts(folder: Path, frozen: FrozenParts) -> None:
    pipeline = load(VersatileDiffusionImageVariationPipeline, folder)
    theirs = pipeline._encode_prompt(drawn(), "cpu", 1, False, None)
    ours = frozen.encode({"image": as_tensor(drawn())}, (), ("image",)).contexts["image"]
    assert_close(ours, theirs, NETWORK_TOLERANCE)


def test_vae(folder: Path, frozen: FrozenParts) -> None:
    vae = load(VersatileDiffusionPipeline, folder).vae
    latents = 0.5 * draw(2, 4, 4, 6, seed=1)
    assert vae.config.scaling_factor == frozen.vaes["image"].latent_scale
    theirs = vae.decode(latents / vae.config.scaling_factor).sample
    assert_close(frozen.vaes["image"].reconstruct(latents / frozen.vaes["image"].latent_scale), theirs, 1e-5)
    images = as_tensor(drawn())[..., :56, :88]
    mean = vae.encode(images / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    assert_close(frozen.vaes["image"].encode(images), mean, NETWORK_TOLERANCE)


def test_scheduler(folder: Path) -> None:
    scheduler = load(VersatileDiffusionPipeline, folder).scheduler
    schedule = Schedule(MODEL.schedule)
    torch.testing.assert_close(scheduler.alphas_cumprod, schedule.alphas_cumprod, atol=1e-6, rtol=0)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    for steps in (5, 50):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == DDIM(schedule, steps).timesteps


def test_text_to_image(folder: Path, diffuser: Diffuser, frozen: FrozenParts) -> None:
    pipeline, noise = load(VersatileDiffusionPipeline, folder), noise_for(2)
    encode = frozen.context_encoders["text"].encode
    given, without = Context("text", encode(CAPTIONS[:2])), Context("text", encode(["", ""]))
    ours = sampled(diffuser, [given], [without], noise)
    theirs = load(VersatileDiffusionTextToImagePipeline, folder)(prompt=CAPTIONS[:2], **settings(noise)).images
    assert_samples_close(ours, theirs)
    # The pipeline of all flows swaps the attention blocks for text, and back: twice gives the same.
    for _ in range(2):
        seen = pipeline.text_to_image(prompt=CAPTIONS[:2], **settings(noise, "np")).images
        decoded = frozen.decode("image", ours).permute(0, 2, 3, 1).numpy()
        assert np.abs(seen * 255 - decoded).max() <= 0.51


def test_image_variation(folder: Path, diffuser: Diffuser, frozen: FrozenParts) -> None:
    noise = noise_for(2)
    pipeline = load(VersatileDiffusionImageVariationPipeline, folder)
    given = Context("image", frozen.context_encoders["image"].encode(as_tensor(drawn())))
    without = Context("image", theirs_for_no_image(pipeline).expand(2, -1, -1))
    ours = sampled(diffuser, [given], [without], noise)
    assert_samples_close(ours, pipeline(image=drawn(), **settings(noise)).images)
    # diffusers gives its image processor pixels of 0.5 for a mid-grey image, and that divides them by 255 once more.
    blank = torch.full((1, 3, 32, 32), 0.5 / 255)
    assert_close(frozen.context_encoders["image"].encode_pixels(normalised(blank)), without.tokens[:1], 1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_dual_guided(
    folder: Path, diffuser: Diffuser, frozen: FrozenParts, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_mask(monkeypatch)
    noise = noise_for(1)
    variation = load(VersatileDiffusionImageVariationPipeline, folder)
    given = [
        Context("text", frozen.context_encoders["text"].encode(CAPTIONS[:1])),
        Context("image", frozen.context_encoders["image"].encode(as_tensor(drawn()[:1]))),
    ]
    without = [
        Context("text", frozen.context_encoders["text"].encode([""])),
        Context("image", theirs_for_no_image(variation)),
    ]
    ratios = [strength, 1 - strength]
    ours = sampled(diffuser, given, without, noise, lambda contexts, _: mixed(contexts, ratios))
    theirs = load(VersatileDiffusionDualGuidedPipeline, folder)(
        prompt=CAPTIONS[0], image=drawn()[0], text_to_image_strength=strength, **settings(noise)
    ).images
    assert_samples_close(ours, theirs)
