"""Adapters: whatever reads a layer's weight reads the sum, in training as after the merge."""

import pytest
import torch

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import LoraConfig, TrainConfig
from vdtrain.errors import ConfigError
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import Context, Diffuser, DiffuserInput, layer_group
from vdtrain.models.execution import blocks, checkpoint_activations, compile_blocks
from vdtrain.models.trained import add_adapters, is_adapter, merged, scale_of, trained_parameters
from vdtrain.weights.tensor_files import LazyTensors

FLOWS = all_flows(["image", "text"])
GROUPS = active_groups(FLOWS)


def config(*words: str) -> TrainConfig:
    return to_object(compose("train", ["model=tiny", "stage=stage3_four_flow", *words]), TrainConfig)


def drawn(seed: int = 0) -> Diffuser:
    model = Diffuser(config().model, GROUPS, seed=seed)
    return randomised(model)


def randomised(model: Diffuser) -> Diffuser:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


def outputs(model: Diffuser) -> list[torch.Tensor]:
    """Of every flow: many tokens of image states, four of text states."""
    generator, found = torch.Generator().manual_seed(1), []
    for flow in FLOWS:
        shape = (2, 4, 4, 4) if flow.output == "image" else (2, 64)
        latents, tokens = torch.randn(shape, generator=generator), torch.randn(2, 17, 64, generator=generator)
        context = [Context(flow.context, tokens)]
        found += model([DiffuserInput(flow.output, latents, torch.tensor([3, 500]), context)])
    return found


def test_new_adapters_change_nothing() -> None:
    model = drawn()
    before = [each.detach() for each in outputs(model)]
    add_adapters(model, GROUPS, LoraConfig(rank=4), seed=0)
    assert all(torch.equal(one, other) for one, other in zip(before, outputs(model), strict=True))


@pytest.mark.parametrize("form", ["plain", "checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_the_merged_model_is_the_trained_one_to_the_bit(form: str) -> None:
    model, lora = drawn(), LoraConfig(rank=4, alpha=6.0)
    if form == "checkpointed":
        checkpoint_activations(model, "blocks")
    add_adapters(model, GROUPS, lora, seed=0)
    randomised(model)
    if form == "compiled":
        compile_blocks(blocks(model.context_layers, model.data_layers), backend="eager")
    weights = merged(LazyTensors.of(model.state_dict()), scale_of(lora))
    plain = Diffuser(config().model, GROUPS)
    moved = drawn().state_dict()
    assert plain.state_dict().keys() == weights.keys()
    assert sum(not torch.equal(moved[name], weights[name]) for name in moved if name.endswith(".weight")) > 50
    plain.load_state_dict(dict(weights))
    assert all(torch.equal(one, other) for one, other in zip(outputs(model), outputs(plain), strict=True))
    sum(each.square().sum() for each in outputs(model)).backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if is_adapter(name))


def test_an_adapter_is_that_of_the_paper_whatever_others_there_are() -> None:
    """The sum is scaled by alpha over rank, and A is uniform within one over the root of its columns."""
    assert scale_of(LoraConfig(rank=4, alpha=6.0)) == 1.5
    assert scale_of(LoraConfig(rank=4)) == scale_of(LoraConfig()) == 1.0
    every, some = Diffuser(config().model, GROUPS), Diffuser(config().model, GROUPS)
    add_adapters(every, GROUPS, LoraConfig(rank=4), seed=0)
    add_adapters(some, ["context.text"], LoraConfig(rank=4, targets=["attn2"]), seed=0)
    downs = {name: each for name, each in every.named_parameters() if name.endswith(".0.down")}
    for name, each in some.named_parameters():
        assert not name.endswith(".0.down") or torch.equal(each, downs[name])
    for name, down in downs.items():
        assert down.shape[0] == 4
        bound = down.shape[1] ** -0.5
        assert down.abs().max() <= bound, name
        assert down.max() > 0.8 * bound, name
        assert down.min() < -0.8 * bound, name
    # No two adapters start alike.
    wide = [down[0, 0].item() * down.shape[1] ** 0.5 for down in downs.values()]
    assert len(set(wide)) == len(wide)


def test_groups_and_targets_choose_the_layers() -> None:
    model = Diffuser(config().model, GROUPS)
    words = ["lora.rank=1000", "lora.groups=[context.text,data.text]", "lora.targets=[attn2,skip_connection]"]
    trained = trained_parameters(model, config(*words))
    assert set(trained) == {"data.text", "context.text"}
    names = [name for parameters in trained.values() for name in parameters]
    assert all(is_adapter(name) and (".attn2." in name or ".skip_connection." in name) for name in names)
    assert {layer_group(name) for name in names} == {"data.text", "context.text"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(names)
    # A rank that a weight cannot have is cut.
    assert model.context_layers["text"][0].transformer_blocks[0].attn2.to_q.parametrizations.weight[0].up.shape[1] == 64
    with pytest.raises(ConfigError, match=r"lora.targets=\[attn3\]: no linear layer or convolution of context.text"):
        trained_parameters(
            Diffuser(config().model, GROUPS),
            config("lora.rank=2", "lora.groups=[context.text]", "lora.targets=[attn3]"),
        )
