"""Sampling through the Python API, on the tiny preset with random diffuser weights."""

from __future__ import annotations

import pytest
import torch

from vdtrain.compose import ConfigError, compose, to_object
from vdtrain.config import TrainConfig
from vdtrain.flows import Flow, active_groups, all_flows
from vdtrain.models.diffuser import Diffuser
from vdtrain.pipeline import VersatileDiffusion
from vdtrain.sample import main as sample

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


def pictures(model: VersatileDiffusion, captions: list[str], **settings: object) -> torch.Tensor:
    return model.generate("text-to-image", captions, **{"resolution": 32, "steps": 4, **settings})


def test_every_flow_gives_samples_of_its_output(model: VersatileDiffusion) -> None:
    made = pictures(model, CAPTIONS)
    assert made.shape == (3, 3, 32, 32)
    assert made.dtype == torch.uint8
    assert model.generate("image-to-image", made, resolution=48, steps=2).shape == (3, 3, 48, 48)
    for flow, given in (("image-to-text", made), ("text-to-text", CAPTIONS)):
        captions = model.generate(flow, given, steps=2)
        assert len(captions) == 3
        assert all(isinstance(caption, str) for caption in captions)


def test_seeds_decide(model: VersatileDiffusion) -> None:
    first = pictures(model, CAPTIONS, seed=1)
    assert torch.equal(first, pictures(model, CAPTIONS, seed=1))
    assert not torch.equal(first, pictures(model, CAPTIONS, seed=2))


def test_a_sample_does_not_depend_on_those_beside_it(model: VersatileDiffusion) -> None:
    together, alone = pictures(model, CAPTIONS), pictures(model, CAPTIONS[:1])
    assert (together[:1].int() - alone.int()).abs().max() <= 1


def test_context_and_guidance_matter(model: VersatileDiffusion) -> None:
    base = pictures(model, CAPTIONS[:1], guidance_scale=1.0)
    assert not torch.equal(base, pictures(model, CAPTIONS[1:2], guidance_scale=1.0))
    assert not torch.equal(base, pictures(model, CAPTIONS[:1], guidance_scale=7.5))


def test_flows_that_were_not_trained_are_refused() -> None:
    single = make_model([Flow("image", "image")])
    with pytest.raises(ConfigError, match="flow=text-to-image: this checkpoint has no layers for 'text'"):
        pictures(single, CAPTIONS)
    with pytest.raises(ConfigError, match="CONTEXT-to-OUTPUT"):
        single.generate("sideways", CAPTIONS)


@pytest.mark.parametrize("resolution", [40, 33, 0])
def test_impossible_resolutions_are_refused(model: VersatileDiffusion, resolution: int) -> None:
    with pytest.raises(ConfigError, match=f"resolution={resolution}: not a multiple of 16"):
        pictures(model, CAPTIONS, resolution=resolution)


@pytest.mark.parametrize("mistake", ["weights=average", "device=tpu", "inputs=[]", "samples_per_inputs=2"])
def test_a_mistake_on_the_command_line_is_one_line(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample([mistake]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {mistake.partition('=')[0]}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(["device=cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: device=cuda: PyTorch finds no GPU")
