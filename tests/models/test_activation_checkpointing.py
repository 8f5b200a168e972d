"""Activation checkpointing keeps fewer bytes and changes neither losses nor gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import Context, Diffuser, DiffuserInput
from vdtrain.models.execution import checkpoint_activations

MODALITIES = ["image", "text"]
LATENT_SHAPES = {"image": (4, 8, 8), "text": (64,)}
BATCH = 3


def make_diffuser() -> Diffuser:
    config = to_object(compose("train", ["model=tiny"]), TrainConfig).model
    model = Diffuser(config, active_groups(all_flows(MODALITIES)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # layers that start at zero would block the gradients
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
    return model


@pytest.fixture
def diffuser() -> Diffuser:
    return make_diffuser()


def four_flows() -> list[DiffuserInput]:
    """The inputs of all four flows in one forward pass, as from the objective."""
    generator = torch.Generator().manual_seed(1)
    return [
        DiffuserInput(
            output,
            torch.randn(2 * BATCH, *LATENT_SHAPES[output], generator=generator),
            torch.arange(2 * BATCH) * 150,
            [Context(name, torch.randn(BATCH, 5, 64, generator=generator)) for name in MODALITIES],
        )
        for output in MODALITIES
    ]


def step(diffuser: Diffuser) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients by name, and bytes beside the parameters that forward keeps for backward."""
    diffuser.zero_grad()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in diffuser.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = torch.stack([predicted.square().mean() for predicted in diffuser(four_flows())]).sum()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in diffuser.named_parameters()}, sum(kept.values())


def test_losses_and_gradients_are_the_same_bits_and_fewer_bytes_are_kept(diffuser: Diffuser) -> None:
    loss, gradients, kept = step(diffuser)
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    for mode, share in (("context", 0.5), ("blocks", 0.1)):
        checkpoint_activations(diffuser, mode)
        again, recomputed, fewer = step(diffuser)
        assert torch.equal(again, loss)
        assert recomputed.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(recomputed[name], gradient), name
        assert fewer < share * kept, mode
    checkpoint_activations(diffuser, "none")
    assert step(diffuser)[2] == kept


def test_a_layer_that_draws_random_numbers_draws_the_same_again(diffuser: Diffuser) -> None:
    """The model's own layers have no dropout; a new modality's may have it."""
    first = diffuser.context_layers["image"][0]
    first.norm = nn.Sequential(first.norm, nn.Dropout(0.5))
    torch.manual_seed(7)
    _, gradients, _ = step(diffuser)
    after = torch.get_rng_state()
    checkpoint_activations(diffuser, "blocks")
    torch.manual_seed(7)
    _, recomputed, _ = step(diffuser)
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(8)
    assert not all(torch.equal(step(diffuser)[1][name], gradient) for name, gradient in gradients.items())


def test_the_models_own_layers_leave_the_generators_alone(diffuser: Diffuser, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> Tensor:
        raise AssertionError("the state was read")

    monkeypatch.setattr(torch, "get_rng_state", read)
    checkpoint_activations(diffuser, "blocks")
    step(diffuser)
    diffuser.data_layers["image"][1].in_layers[0] = nn.Dropout(0.5)
    checkpoint_activations(diffuser, "blocks")
    with pytest.raises(AssertionError, match="the state was read"):
        step(diffuser)


def test_names_and_inference_stay_what_they_are(diffuser: Diffuser) -> None:
    names = list(diffuser.state_dict())
    with torch.no_grad():
        expected = diffuser(four_flows())
        checkpoint_activations(diffuser, "blocks")
        found = diffuser(four_flows())
    assert list(diffuser.state_dict()) == names
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_a_copy_does_not_run_the_originals_layers(diffuser: Diffuser) -> None:
    checkpoint_activations(diffuser, "blocks")
    copied = copy.deepcopy(diffuser)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert all(not predicted.any() for predicted in copied(four_flows()))
        assert all(predicted.any() for predicted in diffuser(four_flows()))
