"""The diffuser's flows and layers against the `diffusers` package's own Versatile Diffusion, same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    Transformer2DModel,
    VersatileDiffusionDualGuidedPipeline,
    VersatileDiffusionTextToImagePipeline,
)
from diffusers.models import DualTransformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import ResnetBlockFlat
from torch import Tensor, nn

from tests.parity.networks import (
    CONTEXT_WIDTH,
    HEADS,
    LAYER_TOLERANCE,
    MODALITIES,
    NETWORK_TOLERANCE,
    NORM_GROUPS,
    TEXT_WIDTH,
    accept_mask,
    assert_close,
    draw,
    make_diffuser,
    make_unet,
    model_config,
    randomise,
    unet_state,
)
from vdtrain.diffusion.contexts import mixed
from vdtrain.flows import Flow, all_flows
from vdtrain.models.context_layers import ContextLayer
from vdtrain.models.diffuser import Context, Diffuser, by_rows, timestep_sinusoid
from vdtrain.models.image_layers import ResidualBlock
from vdtrain.models.layer_plan import DataStep, Role, make_plan
from vdtrain.models.text_layers import FullyConnectedBlock
from vdtrain.weights.published.diffusers_names import BLOCK

PLAN = make_plan(model_config().diffuser)
TOKENS = {"image": 7, "text": 5}
TIMESTEPS = torch.tensor([3, 997])


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def diffuser() -> Diffuser:
    return make_diffuser()


@pytest.fixture
def unets(diffuser: Diffuser) -> dict[str, Any]:
    """diffusers' two U-Nets, as published: each modality's data layers with its own context layers."""
    made = {modality: make_unet(modality) for modality in MODALITIES}
    for modality, unet in made.items():
        unet.load_state_dict(unet_state(diffuser, modality, modality))
    return made


def latents_of(modality: str) -> Tensor:
    return draw(2, 4, 16, 8, seed=1) if modality == "image" else draw(2, TEXT_WIDTH, seed=2)


def context_of(modality: str) -> Context:
    return Context(modality, draw(2, TOKENS[modality], CONTEXT_WIDTH, seed=3 + len(modality)))


@pytest.mark.parametrize("flow", all_flows(MODALITIES), ids=str)
def test_flow(diffuser: Diffuser, unets: dict[str, Any], flow: Flow) -> None:
    if flow.output != flow.context:
        # As diffusers' pipelines do where context and output differ: the U-Nets exchange their attention blocks.
        both = SimpleNamespace(image_unet=unets["image"], text_unet=unets["text"])
        VersatileDiffusionTextToImagePipeline._swap_unet_attention_blocks(both)
    latents, context = latents_of(flow.output), context_of(flow.context)
    # Text latents are images of one pixel there.
    shaped = latents if flow.output == "image" else latents[..., None, None]
    theirs = unets[flow.output](shaped, TIMESTEPS, context.tokens).sample
    ours = diffuser.predict(flow.output, latents, TIMESTEPS, by_rows([context]))
    assert_close(ours, theirs.reshape(latents.shape), NETWORK_TOLERANCE)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_dual_guided_mixing(
    diffuser: Diffuser, unets: dict[str, Any], ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_mask(monkeypatch)
    both = SimpleNamespace(image_unet=unets["image"], text_unet=unets["text"])
    VersatileDiffusionDualGuidedPipeline._convert_to_dual_attention(both)
    converted = [module for module in unets["image"].modules() if isinstance(module, DualTransformer2DModel)]
    assert len(converted) == len(PLAN.context_steps)
    for module in converted:
        module.mix_ratio = ratio
        module.condition_lengths = [TOKENS["text"], TOKENS["image"]]
    text, image = context_of("text"), context_of("image")
    latents = latents_of("image")
    theirs = unets["image"](latents, TIMESTEPS, torch.cat([text.tokens, image.tokens], dim=1)).sample
    ours = diffuser.predict("image", latents, TIMESTEPS, mixed([text, image], [ratio, 1 - ratio]))
    assert_close(ours, theirs, NETWORK_TOLERANCE)


def test_time_embedding(diffuser: Diffuser, unets: dict[str, Any]) -> None:
    timesteps = torch.arange(0, 1000, 37)
    sinusoid = timestep_sinusoid(timesteps, PLAN.time_width)
    for unet in unets.values():
        assert_close(sinusoid, unet.time_proj(timesteps), LAYER_TOLERANCE)
        assert_close(diffuser.global_layers(sinusoid), unet.time_embedding(sinusoid), LAYER_TOLERANCE)


@pytest.mark.parametrize("width_in", [32, 64], ids=["shortcut", "identity"])
@pytest.mark.parametrize("modality", MODALITIES)
def test_block(modality: str, width_in: int) -> None:
    step = DataStep(Role.BLOCK, width_in, 64)
    sizes = {
        "in_channels": width_in,
        "out_channels": 64,
        "temb_channels": PLAN.embedding_width,
        "groups": NORM_GROUPS,
        "eps": 1e-5,
    }
    if modality == "image":
        ours: nn.Module = ResidualBlock(step, PLAN)
        theirs: nn.Module = ResnetBlock2D(**sizes)
        state = draw(2, width_in, 6, 4, seed=4)
    else:
        ours = FullyConnectedBlock(step, PLAN, tokens=4)
        theirs = ResnetBlockFlat(**sizes)
        state = draw(2, width_in, 4, 1, seed=4)
    randomise(ours)
    parts = {own: name for own, name in BLOCK.items() if width_in != 64 or own != "skip_connection"}
    theirs.load_state_dict(
        {
            f"{name}.{kind}": ours.state_dict()[f"{own}.{kind}"]
            for own, name in parts.items()
            for kind in ("weight", "bias")
        }
    )
    embedding = draw(2, PLAN.embedding_width, seed=5)
    assert_close(ours(state, embedding), theirs(state, embedding), LAYER_TOLERANCE)


@pytest.mark.parametrize("size", [(6, 4), (4, 1)], ids=["image state", "text state"])
def test_context_layer(size: tuple[int, int]) -> None:
    ours = randomise(ContextLayer(64, CONTEXT_WIDTH, PLAN))
    theirs = Transformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=64 // HEADS,
        in_channels=64,
        norm_num_groups=NORM_GROUPS,
        cross_attention_dim=CONTEXT_WIDTH,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    state, tokens = draw(2, 64, *size, seed=6), draw(2, 9, CONTEXT_WIDTH, seed=7)
    assert_close(ours(state, tokens), theirs(state, encoder_hidden_states=tokens).sample, LAYER_TOLERANCE)
