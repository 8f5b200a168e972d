from collections.abc import Callable

import pytest
import torch

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.flows import Flow, active_groups, all_flows
from vdtrain.models import context_layers
from vdtrain.models.context_layers import Attention, reads_tokens
from vdtrain.models.diffuser import (
    Context,
    Diffuser,
    DiffuserInput,
    allocated,
    layer_group,
    parameters_by_group,
)
from vdtrain.models.image_layers import ImageDataLayers
from vdtrain.models.layer_plan import LayerPlan

FLOWS = all_flows(["image", "text"])
LATENT_SHAPES = {"image": (4, 8, 8), "text": (64,)}
CONTEXT_SIZES = {"image": 17, "text": 24}


def model_config(name: str) -> ModelConfig:
    return to_object(compose("train", [f"model={name}"]), TrainConfig).model


@pytest.fixture(scope="module")
def diffuser() -> Diffuser:
    model = Diffuser(model_config("tiny"), active_groups(FLOWS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # layers that start at zero would block the gradients
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
    return model


def flow_input(flow: Flow, batch: int = 3) -> DiffuserInput:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, *LATENT_SHAPES[flow.output], generator=generator)
    context = Context(flow.context, torch.randn(batch, 5, 64, generator=generator))
    return DiffuserInput(flow.output, latents, torch.tensor([3, 500, 999][:batch]), [context])


@pytest.mark.parametrize("flow", FLOWS, ids=str)
def test_exactly_the_flows_three_groups_receive_gradients(diffuser: Diffuser, flow: Flow) -> None:
    diffuser.zero_grad(set_to_none=True)
    (predicted,) = diffuser([flow_input(flow)])
    predicted.pow(2).mean().backward()
    for group, parameters in parameters_by_group(diffuser).items():
        with_gradient = {name for name, parameter in parameters.items() if parameter.grad is not None}
        assert with_gradient == (set(parameters) if group in flow.groups else set()), group
        if group in flow.groups:
            assert all(parameter.grad.any() for parameter in parameters.values()), group


def step_of_all_flows(diffuser: Diffuser) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, int]]:
    """The sum of the flows' losses, gradients by name, and how often each cross-attention computed its keys."""
    calls: dict[str, int] = {}
    generator = torch.Generator().manual_seed(1)
    contexts = [Context(name, torch.randn(2, size, 64, generator=generator)) for name, size in CONTEXT_SIZES.items()]
    inputs = [
        DiffuserInput(output, torch.randn(4, *shape, generator=generator), torch.tensor([3, 500, 999, 0]), contexts)
        for output, shape in LATENT_SHAPES.items()
    ]

    def counter(name: str) -> Callable[..., None]:
        def count(*arguments: object) -> None:
            calls[name] = calls.get(name, 0) + 1

        return count

    hooks = [
        module.register_forward_hook(counter(name))
        for name, module in diffuser.named_modules()
        if name.endswith("attn2.to_k")
    ]
    diffuser.zero_grad()
    total = torch.stack([predicted.square().mean() for predicted in diffuser(inputs)]).sum()
    total.backward()
    for hook in hooks:
        hook.remove()
    return total.detach(), {name: parameter.grad.clone() for name, parameter in diffuser.named_parameters()}, calls


def test_keys_and_values_of_a_context_are_computed_once(diffuser: Diffuser, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text flows read the context tokens themselves, with the losses and gradients that keys and values give."""
    loss, gradients, calls = step_of_all_flows(diffuser)
    monkeypatch.setattr(context_layers, "reads_tokens", lambda *sizes: False)
    plain_loss, plain_gradients, plain_calls = step_of_all_flows(diffuser)
    assert len(calls) == 2 * len(diffuser.plan.context_steps)
    assert calls == dict.fromkeys(calls, 1)
    assert plain_calls == dict.fromkeys(calls, 2)
    torch.testing.assert_close(loss, plain_loss, atol=0, rtol=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - plain_gradients[name]).norm() < 1e-5 * plain_gradients[name].norm(), name


def test_few_queries_read_tokens_and_many_read_keys_and_values() -> None:
    for width, side in ((320, 32), (640, 16), (1280, 8)):
        for tokens in (77, 257):
            assert reads_tokens(4, width, 8, tokens, 768)
            assert not reads_tokens(side * side, width, 8, tokens, 768)
        assert not reads_tokens(4, width, 8, 4, width)


@pytest.mark.parametrize("flow", FLOWS, ids=str)
def test_prediction_has_the_latents_shape(diffuser: Diffuser, flow: Flow) -> None:
    given = flow_input(flow)
    (predicted,) = diffuser([given])
    assert predicted.shape == given.latents.shape


def test_fresh_network_predicts_zero() -> None:
    """The last layer starts at zero, so that every flow's first loss is the variance of the noise, 1."""
    model = Diffuser(model_config("tiny"), active_groups(FLOWS))
    for flow in FLOWS:
        (predicted,) = model([flow_input(flow)])
        assert not predicted.any()


def test_every_branch_starts_at_zero() -> None:
    """A fresh block passes its state on: the second convolution, the projection back and the last layer are zero."""
    model = Diffuser(model_config("tiny"), active_groups(FLOWS))
    ends = ("out_layers.3", "proj_out")
    zeros = {
        name.rpartition(".")[0] for name, each in model.named_parameters() if name.endswith("weight") and not each.any()
    }
    inner = {name for name, _ in model.named_modules() if name.endswith(ends)}
    last = {f"data_layers.{name}.{len(layers) - 1}.2" for name, layers in model.data_layers.items()}
    assert len(inner) > 20
    assert zeros == inner | last


def test_products_of_a_query_and_a_token_are_not_rounded_to_bf16() -> None:
    layer = Attention(4, 4, 1).bfloat16()
    with torch.no_grad():
        for part in (layer.to_k, layer.to_v):
            part.weight.copy_(torch.eye(4))
        # Products of 257 and 256, which bf16 cannot tell apart, times a half.
        query = torch.tensor([1.0, 1.0, 0.0, 0.0]).bfloat16().view(1, 1, 1, 4)
        tokens = torch.tensor([[256.0, 1.0, 0.0, 0.0], [256.0, 0.0, 0.0, 0.0]]).bfloat16()[None]
        read = layer._read_tokens(query, tokens)
    assert float(read[0, 0, 0, 1]) == pytest.approx(torch.tensor(0.5).sigmoid().item(), abs=2e-3)


def test_a_groups_random_start_does_not_depend_on_the_others() -> None:
    config = model_config("tiny")
    alone = Diffuser(config, active_groups([Flow("image", "image")]), seed=3)
    whole = Diffuser(config, active_groups(FLOWS), seed=3).state_dict()
    other_seed = Diffuser(config, active_groups([Flow("image", "image")]), seed=4)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, whole[name])
    assert any(not torch.equal(tensor, whole[name]) for name, tensor in other_seed.state_dict().items())


def test_no_two_modalities_start_alike() -> None:
    layers = Diffuser(model_config("tiny"), active_groups(FLOWS)).context_layers
    for (name, image), text in zip(layers["image"].named_parameters(), layers["text"].parameters(), strict=True):
        if "to_q" in name:
            assert not torch.equal(image, text), name


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Diffuser(model_config("tiny"), active_groups(FLOWS))
    assert torch.equal(before, torch.get_rng_state())


def test_full_size_has_the_released_models_parameters() -> None:
    with torch.device("meta"):
        model = Diffuser(model_config("versatile_diffusion"), active_groups(FLOWS))
    counts = {
        group: sum(parameter.numel() for parameter in parameters.values())
        for group, parameters in parameters_by_group(model).items()
    }
    assert counts == {
        "global": 2_050_560,
        "data.image": 590_231_044,
        "context.image": 267_239_360,
        "data.text": 1_439_558_528,
        "context.text": 267_239_360,
    }
    assert sum(counts.values()) == 2_566_318_852


def test_layer_group_of_parameter_names() -> None:
    assert layer_group("global_layers.0.weight") == "global"
    assert layer_group("data_layers.image.3.op.bias") == "data.image"
    assert layer_group("context_layers.text.0.norm.weight") == "context.text"


class Windowed(ImageDataLayers):
    """Layers with a table that no weights file holds."""

    def __init__(self, plan: LayerPlan, latent_channels: int) -> None:
        super().__init__(plan, latent_channels)
        self.register_buffer("window", torch.full((3,), 7.0), persistent=False)


@pytest.mark.parametrize("target", ["vdtrain.models.image_layers.ImageDataLayers", f"{__name__}.Windowed"])
def test_weights_fill_a_diffuser_without_values(target: str) -> None:
    config = model_config("tiny")
    config.modalities["image"].data_layers = {"_target_": target, "latent_channels": 4}
    drawn = Diffuser(config, active_groups(FLOWS), seed=3)
    filled = allocated(config, active_groups(FLOWS), "cpu")
    for name, tensor in filled.state_dict().items():
        tensor.copy_(drawn.state_dict()[name])
    assert not any(tensor.is_meta for tensor in (*filled.parameters(), *filled.buffers()))
    for found, expected in ((filled.parameters(), drawn.parameters()), (filled.buffers(), drawn.buffers())):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(filled([flow_input(FLOWS[0])])[0], drawn([flow_input(FLOWS[0])])[0])
