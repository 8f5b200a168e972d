"""Sampling through the Python API, on the tiny preset with random diffuser weights."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vdtrain.commands.blend import main as blend
from vdtrain.commands.edit import main as edit_verb
from vdtrain.commands.sample import main as sample
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.diffusion.contexts import joined_by_modality, low_rank, make_mixing, mixed
from vdtrain.diffusion.editing import changed, edit
from vdtrain.diffusion.sampling import SOLVERS
from vdtrain.flows import Flow, active_groups, all_flows
from vdtrain.grid import Pictures
from vdtrain.models.diffuser import Context, Diffuser
from vdtrain.pipeline import ContextInput, VersatileDiffusion

CAPTIONS = ["a red circle", "a blue star", "a green square"]
BYTES = {"output_type": "tensor"}


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
    return model.generate("text-to-image", captions, **{**BYTES, "height": 32, "width": 32, "steps": 4, **settings})


def test_every_flow_gives_samples_of_its_output(model: VersatileDiffusion) -> None:
    made = images(model, CAPTIONS)
    assert made.shape == (3, 3, 32, 32)
    assert made.dtype == torch.uint8
    assert model.generate("image-to-image", made, height=48, width=48, steps=2, **BYTES).shape == (3, 3, 48, 48)
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


@pytest.mark.parametrize(("scale", "passes"), [(0.0, 2), (1.0, 1), (7.5, 2)])
def test_guidance_of_one_needs_no_unconditional_pass(model: VersatileDiffusion, scale: float, passes: int) -> None:
    rows: list[int] = []
    hook = model.diffuser.global_layers.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    made = images(model, CAPTIONS[:2], guidance_scale=scale)
    hook.remove()
    assert set(rows) == {2 * passes}
    if scale == 0:
        assert torch.equal(made, images(model, CAPTIONS[1:], guidance_scale=scale))


def test_flows_that_were_not_trained_are_refused() -> None:
    single = make_model([Flow("image", "image")])
    with pytest.raises(ConfigError, match="flow=text-to-image: this checkpoint has no layers for 'text'"):
        images(single, CAPTIONS)
    with pytest.raises(ConfigError, match="flow=image-to-text: this checkpoint has no layers for 'text'"):
        edit(single, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), add="a star")
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
    plain, content, style = (model.generate("image-to-image", given, focus=level, **DRAWN) for level in (0.5, 0.1, 0.9))
    assert torch.equal(plain, model.generate("image-to-image", given, **DRAWN))
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
    whole = images(model, CAPTIONS, start_from=given, fidelity=1, output_type="latent")
    assert torch.equal(whole, model.encode_latents("image", given))
    for wrong, message in (
        ({"fidelity": 0.5}, r"start_from: nothing for 3 inputs; fidelity=0\.5 needs one"),
        ({"fidelity": 0.5, "start_from": given[:2]}, "start_from: 2 for 3 inputs"),
        ({"fidelity": 1.5}, r"fidelity=1\.5: must be from 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            images(model, CAPTIONS, **wrong)


SMALL = {"height": 32, "width": 32, "steps": 3}
DRAWN = {**SMALL, **BYTES}


@pytest.mark.parametrize("output", ["image", "text"])
def test_a_blend_of_one_context_is_its_flow(model: VersatileDiffusion, output: str) -> None:
    blended = model.blend(output, [ContextInput("text", CAPTIONS[0])], **DRAWN)
    plain = model.generate(f"text-to-{output}", CAPTIONS[:1], **DRAWN)
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
        made = model.blend(output, inputs, count=3, mixing=mixing, join=join, **DRAWN)
        assert len(made) == 3
        again = model.blend(output, inputs, count=3, mixing=mixing, join=join, batch_size=2, **DRAWN)
        assert (made.int() - again.int()).abs().max() <= 1 if output == "image" else made == again


def test_weights_and_masks_matter_and_only_their_ratios(model: VersatileDiffusion) -> None:
    drawn = images(model, CAPTIONS[:1], seed=9)[0]

    def made(text: float, image: float, mask: torch.Tensor | None = None) -> torch.Tensor:
        parts = [ContextInput("text", CAPTIONS[0], text), ContextInput("image", drawn, image, mask)]
        return model.blend("image", parts, **DRAWN)

    assert torch.equal(made(1, 3), made(2, 6))
    assert not torch.equal(made(1, 3), made(3, 1))
    assert torch.equal(made(1, 0), model.generate("text-to-image", CAPTIONS[:1], **DRAWN))
    assert (made(1, 3, torch.ones(1, 4, 4)).int() - made(1, 3).int()).abs().max() <= 1
    assert not torch.equal(made(1, 3, torch.zeros(1, 4, 4)), made(1, 3))


def test_contexts_of_one_modality_are_joined_by_their_weights() -> None:
    first, second, third, other = (torch.randn(2, length, 8) for length in (5, 5, 5, 3))
    given = [Context("text", first), Context("image", other), Context("text", second), Context("text", third)]
    (texts, image), weights = joined_by_modality(given, [1.0, 5.0, 3.0, 0.0])
    assert (texts.modality, image.modality, weights) == ("text", "image", [4.0, 5.0])
    torch.testing.assert_close(texts.tokens, torch.cat([0.5 * first, 1.5 * second], dim=1))
    torch.testing.assert_close(image.tokens, other)


class Tokens(torch.nn.Module):
    """A context layer that returns its context."""

    def forward(self, h: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


def test_layers_take_their_contexts_by_weight_and_others_at_each_timestep() -> None:
    positions = 2000
    layers = torch.nn.ModuleDict({"text": torch.nn.ModuleList([Tokens()] * positions)})
    contexts = [Context("text", torch.full((1, 1, 1), value)) for value in (0.0, 1.0)]

    def taken(seed: int, timestep: int) -> torch.Tensor:
        route = make_mixing("layer", [1.0, 3.0], positions, seed)(contexts, timestep)
        return torch.stack([route(layers, position, torch.zeros(1, 1, 1)) for position in range(positions)])

    one = taken(0, 500)
    # Four standard deviations of the share.
    assert abs(float(one.mean()) - 0.75) < 0.04
    assert torch.equal(one, taken(0, 500))
    for other in (taken(0, 480), taken(1, 500)):
        assert 0.3 < float((one != other).float().mean()) < 0.45


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
            model.blend("image", inputs, **{**DRAWN, **settings})


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


def test_an_edit_is_what_its_steps_give_one_by_one(model: VersatileDiffusion) -> None:
    given, seeds = images(model, CAPTIONS), [3, 1, 2]
    drawn, captions = edit(
        model, given, remove="a circle", add="a star", text_share=0.6, style_rank=2, seeds=seeds, **SMALL
    )
    chosen, tokens = model.settings(SMALL), model.encode_context("image", given)
    latents = model.sample("text", [Context("image", tokens)], chosen, seeds=seeds, decode=False)
    assert captions == model.decode("text", changed(model, latents, "a circle", "a star"), seeds)
    texts = [model.encode_context("text", captions), model.encode_context("text", ["a star"] * 3)]
    empty, blank = (model.unconditional("image", modality) for modality in ("text", "image"))
    expected = model.sample(
        "image",
        [Context("text", torch.cat(texts, dim=1)), Context("image", low_rank(tokens[:, 1:], 2))],
        chosen,
        unconditional=[Context("text", torch.cat([empty, empty], dim=1)), Context("image", blank[:, 1:])],
        mixing=lambda contexts, timestep: mixed(contexts, [3, 2]),
        seeds=seeds,
    )
    assert (drawn.int() - expected.int()).abs().max() <= 1


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


def test_a_caption_is_one_line_of_its_file(tmp_path: Path) -> None:
    """Also one with what Python takes for the end of a line, which a decoder may well make."""
    words = ["flow=text-to-text", f"output_dir={tmp_path}", "steps=2"]
    given = ["inputs=[a, b]", 'start_from=["two\nlines\u2028and a third", "another"]', "fidelity=1"]
    for number in ("", "-0002"):
        assert sample(["tiny", *words, *given]) == 0
        lines = (tmp_path / f"captions{number}.txt").read_text().splitlines()
        assert lines == ["two lines and a third", "another"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(["tiny", "a red circle", "device=cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: device=cuda: PyTorch finds no GPU")


# --- samples and arguments as people write them ----------------------------------------------------------------------


def test_one_caption_is_one_picture_that_a_notebook_shows(model: VersatileDiffusion) -> None:
    made = model.generate("text-to-image", "a red circle", **SMALL)
    (picture,) = made
    assert isinstance(picture, Image.Image)
    assert (picture.size, picture.mode) == ((32, 32), "RGB")
    many = model.generate("text-to-image", CAPTIONS, **SMALL)
    shown, one = (Image.open(io.BytesIO(each._repr_png_())) for each in (many, many[:1]))
    assert shown.width > 3 * 192 > 2 * one.width
    assert many[3:]._repr_png_() is None
    # Without a size, the model's own.
    assert model.generate("text-to-image", "a red circle", steps=1)[0].size == (64, 64)


def test_images_in_every_form_mean_the_same(model: VersatileDiffusion, tmp_path: Path) -> None:
    tensor = images(model, CAPTIONS[:1], seed=9)
    (picture,) = Pictures.of(tensor)
    picture.save(tmp_path / "a.png")
    array = np.asarray(picture)
    forms = [
        *(tensor, tensor[0], [tensor[0]], tensor.float() / 255, picture, [picture], array, array[None], array / 255.0),
        *(str(tmp_path / "a.png"), tmp_path / "a.png", (tmp_path / "a.png",), picture.convert("RGBA")),
    ]
    expected = model.generate("image-to-image", tensor, **DRAWN)
    for form in forms:
        assert torch.equal(model.generate("image-to-image", form, **DRAWN), expected)
    assert torch.equal(model.blend("image", [picture], **DRAWN), model.blend("image", [tensor[0]], **DRAWN))
    assert torch.equal(model.blend("image", tmp_path / "a.png", **DRAWN), model.blend("image", [picture], **DRAWN))
    # Images of several sizes go together.
    assert len(model.generate("image-to-text", [picture, picture.resize((50, 90)), array], **SMALL)) == 3
    both = [Image.new("L", (8, 8)), np.zeros((8, 8), np.uint8), torch.zeros(8, 8), np.zeros((1, 8, 8), bool)]
    hidden = [model.blend("image", [ContextInput("image", picture, mask=mask)], **DRAWN) for mask in both]
    assert all(torch.equal(each, hidden[0]) for each in hidden)
    with_text = [("a red circle", 2), ContextInput("image", picture)]
    assert len(model.blend("text", with_text, count=2, **SMALL)) == 2


def test_every_kind_of_output(model: VersatileDiffusion) -> None:
    kinds = {
        each: model.generate("text-to-image", CAPTIONS[:2], output_type=each, **SMALL)
        for each in ("pil", "tensor", "pt", "np", "latent")
    }
    assert kinds["tensor"].dtype == torch.uint8
    assert torch.equal(kinds["pt"], kinds["tensor"].float() / 255)
    assert kinds["np"].shape == (2, 32, 32, 3)
    assert [np.asarray(each).tolist() for each in kinds["pil"]] == kinds["tensor"].permute(0, 2, 3, 1).tolist()
    assert torch.equal(model.decode("image", kinds["latent"]), kinds["tensor"])
    edited, captions = model.edit(kinds["pil"], add="a star", **SMALL)
    assert isinstance(edited, Pictures)
    assert len(edited) == len(captions) == 2
    assert model.blend("image", ["a"], output_type="latent", **SMALL).shape == (1, 4, 4, 4)


@pytest.mark.parametrize(("steps", "strength"), [(50, 0.1), (25, 0.2), (10, 0.3), (10, 0.99), (10, 1.0)])
def test_strength_takes_as_many_steps_as_in_diffusers(model: VersatileDiffusion, steps: int, strength: float) -> None:
    """Their product has no rounding error there; that of 1 - fidelity may fall below a whole number."""
    taken: list[int] = []

    def watched(turns: Sequence[int]) -> Sequence[int]:
        taken.extend(turns)
        return turns

    start = {"start_from": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}
    given = {"strength": strength} | (start if strength < 1 else {})
    images(model, CAPTIONS[:1], steps=steps, progress=watched, **given)
    assert len(taken) == int(steps * strength)


def test_names_of_diffusers(model: VersatileDiffusion) -> None:
    ours = model.generate("text-to-image", CAPTIONS[:1], samples_per_input=2, steps=3, height=32, width=32, **BYTES)
    names = {"num_inference_steps": 3, "num_images_per_prompt": 2, "resolution": 32}
    assert torch.equal(model.generate("text-to-image", prompt=CAPTIONS[0], **names, **BYTES), ours)
    assert len(model.blend("image", CAPTIONS, **names)) == 2
    assert len(model.edit(image=Pictures.of(ours), add="a star", num_inference_steps=2, resolution=32)[0]) == 2
    start = {"start_from": ours[:1], **DRAWN}
    assert torch.equal(
        model.generate("text-to-image", CAPTIONS[0], strength=0.25, **start),
        model.generate("text-to-image", CAPTIONS[0], fidelity=0.75, **start),
    )
    plain = images(model, CAPTIONS[:1])
    assert torch.equal(images(model, CAPTIONS[:1], negative_prompt=""), plain)
    assert not torch.equal(images(model, CAPTIONS[:1], negative_prompt="a blue star"), plain)


def test_generators_decide(model: VersatileDiffusion) -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    drawn = generator()
    first, second = (images(model, CAPTIONS[:1], generator=drawn) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, images(model, CAPTIONS[:1], generator=generator()))
    alike = images(model, [CAPTIONS[0]] * 2, generator=[generator(), generator()])
    assert (alike[0].int() - alike[1].int()).abs().max() <= 1
    assert len(model.blend("image", CAPTIONS, count=2, generator=generator(), **SMALL)) == 2
    assert len(model.edit(first, add="a star", generator=generator(), **SMALL)[0]) == 1


def test_each_generator_decides_its_own_edit(model: VersatileDiffusion) -> None:
    """Also the words of its caption, which the image is made from; one step leaves many words likely."""

    def edited(*seeds: int) -> list[str]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = torch.zeros(len(seeds), 3, 32, 32, dtype=torch.uint8)
        return model.edit(given, add="a star", generator=generators, **{**SMALL, "steps": 1, "solver": "unipc"})[1]

    alone = [*edited(5), *edited(6), *edited(7)]
    assert len(set(alone)) == 3
    assert edited(5, 6, 7) == alone


def test_a_model_moves_and_changes_its_precision(model: VersatileDiffusion) -> None:
    moved = VersatileDiffusion(model.config, copy.deepcopy(model.diffuser))
    assert moved.to("cpu", torch.bfloat16) is moved
    assert {each.dtype for each in moved.diffuser.parameters()} == {torch.bfloat16}
    assert len(images(moved, CAPTIONS[:1])) == 1
    moved.to(dtype=torch.float32).to(device="cpu")
    assert {each.dtype for each in moved.frozen.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("flow", "inputs", "settings", "message"),
    [
        ("text-to-image", None, {}, "inputs: number 0 is None and not a caption"),
        ("text-to-image", [], {}, "inputs: empty"),
        ("text-to-image", ["a", 3], {}, "inputs: number 1 is of type int .3. and not a caption"),
        ("text-to-image", Image.new("RGB", (8, 8)), {}, "inputs: number 0 is of type Image .* take another flow"),
        ("image-to-text", "a red circle", {}, "a red circle: .*give an image file"),
        ("image-to-text", [None], {}, "inputs: number 0 is None and not an image; give a file name, a PIL image"),
        ("image-to-text", torch.zeros(1, 5, 8, 8), {}, r"inputs: of type Tensor .* images are \[B, 3, H, W\]"),
        ("image-to-text", torch.full((3, 8, 8), 255.0), {}, "inputs: values from 255 to 255; images are uint8"),
        ("image-to-text", [torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], {}, "inputs: tensors of shapes"),
        ("text-to-image", "a", {"guidance": 3}, "guidance: no such argument; did you mean 'guidance_scale'?"),
        ("text-to-image", "a", {"steps": 2.5}, "steps=2.5: give an integer"),
        ("text-to-image", "a", {"guidance_scale": "7"}, "guidance_scale='7': give a number"),
        ("text-to-image", "a", {"steps": 2, "num_inference_steps": 2}, "num_inference_steps: given together with"),
        ("text-to-image", "a", {"prompt": "b"}, "prompt: given together with inputs"),
        ("text-to-image", "a", {"generator": 3}, "generator=3: give a torch.Generator"),
        ("text-to-image", "a", {"generator": torch.Generator(), "seed": 1}, "generator: given together with seed"),
        ("text-to-image", "a", {"output_type": "jpg"}, "output_type='jpg': choose one of pil, tensor"),
        ("text-to-image", "a", {"samples_per_input": 0}, "samples_per_input=0: give a whole number"),
        ("text-to-image", "a", {"start_from": Image.new("RGB", (8, 8))}, "start_from: nothing of it remains"),
        ("text-to-image", "a", {"start_from": torch.zeros(3, 8, 8), "fidelity": 0.5}, "start_from: 8 x 8, for images"),
        ("text-to-text", "a", {"focus": "style"}, "focus='style': give a number"),
        ("text-to-image", "a", {"guidance_scale": math.nan}, "guidance_scale=nan: must be a finite number"),
        ("text-to-image", "a", {"guidance_scale": 1e39, **SMALL}, r"guidance_scale=1e\+39: latents are not finite"),
        (
            "image-to-text",
            torch.zeros(3, 8, 8),
            {"guidance_scale": 1e39},
            r"guidance_scale=1e\+39: latents are not fin",
        ),
        ("text-to-image", ["a", "b"], {"seed": 2**64 - 1}, "seed=18446744073709551615: PyTorch's generators do not"),
        ("text-to-image", "a", {"seed": -(2**63) - 1}, "seed=-9223372036854775809: PyTorch's generators do not"),
        ("text-to-image", "red \udcff", {}, r"inputs: number 0 is 'red \\udcff', which UTF-8 cannot write"),
        ("text-to-image", "a", {"negative_prompt": "\ud83d"}, "negative_prompt='.*': one text"),
        (
            "text-to-text",
            "a",
            {"start_from": "\ud83d", "fidelity": 0.5},
            "start_from: number 0 is .* UTF-8 cannot write",
        ),
        ("image-to-image", torch.zeros(3, 8, 8), {"negative_prompt": "a"}, "negative_prompt='a': one text"),
    ],
)
def test_mistakes_are_one_clear_error(
    model: VersatileDiffusion, flow: str, inputs: object, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        model.generate(flow, inputs, **settings)
    assert "\n" not in str(found.value)


def test_mistakes_of_the_other_methods(model: VersatileDiffusion) -> None:
    mistakes: list[tuple[Callable[[], object], str]] = [
        (lambda: model.blend("image", [3]), "contexts: 3 is no context"),
        (lambda: model.blend("image", [("a", "b")]), "weight='b': give a number"),
        (lambda: model.blend("image", [("a", math.nan), "b"]), "none may be negative or infinite"),
        (lambda: model.blend("image", [("a", math.inf), "b"]), "none may be negative or infinite"),
        (lambda: model.edit(torch.zeros(3, 8, 8), add="\udcff"), "add=.*: give one text"),
        (lambda: model.blend("image", [ContextInput("image", "nowhere.png")]), "nowhere.png: "),
        (lambda: model.blend("image", [ContextInput("image", torch.zeros(2, 3, 8, 8))]), "contexts.0: 2 samples"),
        (lambda: model.edit("nowhere.png", add="a"), "nowhere.png: "),
        (lambda: model.edit(torch.zeros(3, 8, 8), add=["a"]), "add=.*: give one text"),
        (lambda: model.to("gpu"), "device=gpu: "),
        (lambda: model.to(torch.int8), "dtype=torch.int8: choose"),
    ]
    for mistaken, message in mistakes:
        with pytest.raises(ConfigError, match=message):
            mistaken()
