"""Sampling through the Python API, on the tiny preset with random diffuser weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from vdtrain.commands.blend import main as blend
from vdtrain.commands.edit import main as edit_verb
from vdtrain.commands.sample import main as sample
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.diffusion.editing import changed, edit
from vdtrain.diffusion.sampling import SOLVERS
from vdtrain.flows import Flow, active_groups, all_flows
from vdtrain.models.diffuser import Diffuser
from vdtrain.pipeline import ContextInput, VersatileDiffusion

CAPTIONS = ["a red circle", "a blue star", "a green square"]


def make_model(flows: list[Flow]) -> VersatileDiffusion:
    config = to_object(compose("train", ["model=tiny"]), TrainConfig).model
    diffuser = Diffuser(config, active_groups(flows))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in diffuser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return VersatileDiffusion(config, diffuser)


@pytest.fixture(scope="module")
def model() -> VersatileDiffusion:
    return make_model(all_flows(["image", "text"]))


def images(model: VersatileDiffusion, captions: list[str], **settings: object) -> torch.Tensor:
    return model.generate("text-to-image", captions, **{"height": 32, "width": 32, "steps": 4, **settings})


def test_every_flow_gives_samples_of_its_output(model: VersatileDiffusion) -> None:
    made = images(model, CAPTIONS)
    assert made.shape == (3, 3, 32, 32)
    assert made.dtype == torch.uint8
    assert model.generate("image-to-image", made, height=48, width=48, steps=2).shape == (3, 3, 48, 48)
    for flow, given in (("image-to-text", made), ("text-to-text", CAPTIONS)):
        captions = model.generate(flow, given, steps=2)
        assert len(captions) == 3
        assert all(isinstance(caption, str) for caption in captions)


def test_seeds_decide(model: VersatileDiffusion) -> None:
    first = images(model, CAPTIONS, seed=1)
    assert torch.equal(first, images(model, CAPTIONS, seed=1))
    assert not torch.equal(first, images(model, CAPTIONS, seed=2))


def test_a_sample_does_not_depend_on_those_beside_it(model: VersatileDiffusion) -> None:
    together, alone = images(model, CAPTIONS), images(model, CAPTIONS[:1])
    assert (together[:1].int() - alone.int()).abs().max() <= 1


def test_context_and_guidance_matter(model: VersatileDiffusion) -> None:
    base = images(model, CAPTIONS[:1], guidance_scale=1.0)
    assert not torch.equal(base, images(model, CAPTIONS[1:2], guidance_scale=1.0))
    assert not torch.equal(base, images(model, CAPTIONS[:1], guidance_scale=7.5))


def test_flows_that_were_not_trained_are_refused() -> None:
    single = make_model([Flow("image", "image")])
    with pytest.raises(ConfigError, match="flow=text-to-image: this checkpoint has no layers for 'text'"):
        images(single, CAPTIONS)
    with pytest.raises(ConfigError, match="CONTEXT-to-OUTPUT"):
        single.generate("sideways", CAPTIONS)


@pytest.mark.parametrize("side", ["height", "width"])
@pytest.mark.parametrize("pixels", [40, 33, 0])
def test_impossible_sizes_are_refused(model: VersatileDiffusion, side: str, pixels: int) -> None:
    with pytest.raises(ConfigError, match=f"{side}={pixels}: not a multiple of 16"):
        images(model, CAPTIONS, **{side: pixels})


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_the_batch_size(model: VersatileDiffusion, solver: str) -> None:
    whole, pieces = (images(model, CAPTIONS, solver=solver, batch_size=size) for size in (8, 2))
    assert (whole.int() - pieces.int()).abs().max() <= 1
    assert not torch.equal(whole[0], whole[1])
    made = [model.generate("image-to-text", whole, steps=2, batch_size=size, seed=3) for size in (8, 1)]
    assert made[0] == made[1]


def test_eta_keeps_samples_apart_from_the_batch_size(model: VersatileDiffusion) -> None:
    whole, pieces = (images(model, CAPTIONS, eta=1.0, batch_size=size) for size in (8, 2))
    assert (whole.int() - pieces.int()).abs().max() <= 1
    assert not torch.equal(whole, images(model, CAPTIONS))


def test_images_need_not_be_square(model: VersatileDiffusion) -> None:
    assert images(model, CAPTIONS[:1], height=32, width=64).shape == (1, 3, 32, 64)


def test_the_networks_may_run_in_bfloat16(model: VersatileDiffusion) -> None:
    half = VersatileDiffusion(model.config, copy.deepcopy(model.diffuser), dtype=torch.bfloat16)
    difference = images(half, CAPTIONS).float() - images(model, CAPTIONS).float()
    assert difference.abs().mean() < 8


def test_focus_turns_the_context(model: VersatileDiffusion) -> None:
    given = images(model, CAPTIONS)
    plain, content, style = (
        model.generate("image-to-image", given, height=32, width=32, steps=4, focus=level) for level in (0.5, 0.1, 0.9)
    )
    assert torch.equal(plain, model.generate("image-to-image", given, height=32, width=32, steps=4))
    assert not torch.equal(plain, content)
    assert not torch.equal(plain, style)
    with pytest.raises(ConfigError, match="focus=2: must be from 0"):
        model.generate("image-to-image", given, focus=2)


def test_fidelity_keeps_more_and_more_of_the_start(model: VersatileDiffusion) -> None:
    given = images(model, CAPTIONS, seed=9)
    distances = [
        float((images(model, CAPTIONS, steps=20, start_from=given, fidelity=level).float() - given).abs().mean())
        for level in (0.1, 0.5, 0.9, 1.0)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0
    for wrong, message in (
        ({"fidelity": 0.5}, r"start_from: nothing for 3 inputs; fidelity=0\.5 needs one"),
        ({"fidelity": 0.5, "start_from": given[:2]}, "start_from: 2 for 3 inputs"),
        ({"fidelity": 1.5}, r"fidelity=1\.5: must be from 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            images(model, CAPTIONS, **wrong)


SMALL = {"height": 32, "width": 32, "steps": 3}


@pytest.mark.parametrize("output", ["image", "text"])
def test_a_blend_of_one_context_is_its_flow(model: VersatileDiffusion, output: str) -> None:
    blended = model.blend(output, [ContextInput("text", CAPTIONS[0])], **SMALL)
    plain = model.generate(f"text-to-{output}", CAPTIONS[:1], **SMALL)
    assert torch.equal(blended, plain) if output == "image" else blended == plain


@pytest.mark.parametrize("output", ["image", "text"])
@pytest.mark.parametrize("mixing", ["attention", "layer"])
def test_blends_of_any_number_of_contexts(model: VersatileDiffusion, output: str, mixing: str) -> None:
    """This includes text from several contexts, for which the original crashes."""
    drawn = images(model, CAPTIONS[:1], seed=9)[0]
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1
    inputs = [
        ContextInput("text", CAPTIONS[0], 1.0),
        ContextInput("text", CAPTIONS[1], 2.0),
        ContextInput("image", drawn, 0.5),
        ContextInput("image", drawn, 0.5, mask),
    ]
    for join in (True, False):
        made = model.blend(output, inputs, count=3, mixing=mixing, join=join, **SMALL)
        assert len(made) == 3
        again = model.blend(output, inputs, count=3, mixing=mixing, join=join, batch_size=2, **SMALL)
        assert (made.int() - again.int()).abs().max() <= 1 if output == "image" else made == again


def test_weights_and_masks_matter_and_only_their_ratios(model: VersatileDiffusion) -> None:
    drawn = images(model, CAPTIONS[:1], seed=9)[0]

    def made(text: float, image: float, mask: torch.Tensor | None = None) -> torch.Tensor:
        parts = [ContextInput("text", CAPTIONS[0], text), ContextInput("image", drawn, image, mask)]
        return model.blend("image", parts, **SMALL)

    assert torch.equal(made(1, 3), made(2, 6))
    assert not torch.equal(made(1, 3), made(3, 1))
    assert torch.equal(made(1, 0), model.generate("text-to-image", CAPTIONS[:1], **SMALL))
    assert (made(1, 3, torch.ones(1, 4, 4)).int() - made(1, 3).int()).abs().max() <= 1
    assert not torch.equal(made(1, 3, torch.zeros(1, 4, 4)), made(1, 3))


def test_impossible_blends_are_refused(model: VersatileDiffusion) -> None:
    text = ContextInput("text", CAPTIONS[0])
    for inputs, settings, message in (
        ([], {}, "contexts: 0 for 1 samples"),
        ([text], {"count": 0}, "contexts: 1 for 0 samples"),
        ([ContextInput("text", "a", -1.0)], {}, "none may be negative"),
        ([ContextInput("text", "a", 0.0)], {}, "one must be above 0"),
        ([text], {"mixing": "coin"}, "mixing=coin: choose one of attention, layer"),
        ([ContextInput("sound", "a")], {}, "no layers for 'sound'"),
        ([ContextInput("text", "a", 1.0, torch.ones(1, 2, 2))], {}, "mask: contexts of modality 'text' take no mask"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.blend("image", inputs, **{**SMALL, **settings})


def test_editing_moves_the_text_latent(model: VersatileDiffusion) -> None:
    latents = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    away, new = (model.encode_latents("text", [words])[0] for words in ("a circle", "a star"))
    moved = changed(model, latents, "a circle", "a star")
    torch.testing.assert_close((moved - new) @ away, torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(changed(model, latents, "", "a star"), latents + new)
    given = images(model, CAPTIONS)
    for words in ({"remove": "a circle"}, {"add": "a star"}, {"remove": "a circle", "add": "a star"}):
        drawn, captions = edit(model, given, **words, **SMALL)
        assert drawn.shape == given.shape
        assert len(captions) == 3
    with pytest.raises(ConfigError, match="remove, add: both are empty"):
        edit(model, given, **SMALL)
    with pytest.raises(ConfigError, match=r"text_share=1\.5"):
        edit(model, given, add="a star", text_share=1.5, **SMALL)


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        (sample, "weights=average"),
        (sample, "device=tpu"),
        (sample, "precision=int4"),
        (sample, "inputs=[]"),
        (sample, "samples_per_inputs=2"),
        (sample, "samples_per_input=0"),
        (sample, "start_from=[a.png,b.png]"),
        (blend, "checkpoint=nowhere"),
        (edit_verb, "inputs=[]"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    command: Callable[[list[str]], int], mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([mistake]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {mistake.partition('=')[0]}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(["device=cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: device=cuda: PyTorch finds no GPU")
