"""The losses of all flows against a computation flow by flow."""

import pytest
import torch

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import ObjectiveConfig, TrainConfig
from vdtrain.diffusion.objective import Objective, StepRandom
from vdtrain.diffusion.schedule import Schedule
from vdtrain.flows import Flow, active_groups, all_flows
from vdtrain.models.diffuser import Context, Diffuser, DiffuserInput
from vdtrain.models.frozen import Encoded

FLOWS = all_flows(["image", "text"])
BATCH = 4


class Unconditional:
    """Replaces the frozen parts; the tests supply latents and contexts."""

    def unconditional(self, flow: Flow, batch: int) -> torch.Tensor:
        return torch.full((batch, 1, 64), {"image": 0.0, "text": 0.5}[flow.context])


@pytest.fixture(scope="module")
def diffuser() -> Diffuser:
    model = Diffuser(to_object(compose("train", ["model=tiny"]), TrainConfig).model, active_groups(FLOWS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    generator = torch.Generator().manual_seed(1)
    return Encoded(
        {
            "image": torch.randn(BATCH, 4, 4, 4, generator=generator),
            "text": torch.randn(BATCH, 64, generator=generator),
        },
        {name: torch.randn(BATCH, 5, 64, generator=generator) for name in ("image", "text")},
    )


def rng(step: int = 0) -> StepRandom:
    return StepRandom("seed", step, BATCH, slice(0, BATCH), torch.device("cpu"))


def objective(**settings: object) -> Objective:
    config = ObjectiveConfig(**{"context_dropout": 0.5, "flow_weights": {}, **settings})
    return Objective(
        FLOWS, Schedule(to_object(compose("train", []), TrainConfig).model.schedule), Unconditional(), config
    )


def test_flows_together_equal_flows_alone(diffuser: Diffuser, encoded: Encoded) -> None:
    with torch.no_grad():
        losses = objective().losses(diffuser, encoded, rng())
    own = rng()
    schedule = objective().schedule
    for flow in FLOWS:
        latents = encoded.latents[flow.output]
        noise = own.normal(f"noise/{flow}", latents.shape[1:])
        timesteps = own.integers(f"timestep/{flow}", 1000)
        tokens = encoded.contexts[flow.context].clone()
        tokens[own.chance(f"dropout/{flow}", 0.5)] = Unconditional().unconditional(flow, 1)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with torch.no_grad():
            (out,) = diffuser([DiffuserInput(flow.output, noisy, timesteps, [Context(flow.context, tokens)])])
        torch.testing.assert_close(losses[flow.name], (out - noise).pow(2).mean(), atol=1e-6, rtol=1e-6)


def test_one_backward_of_the_sum_equals_a_backward_per_flow(diffuser: Diffuser, encoded: Encoded) -> None:
    whole = objective(flow_weights={"text-to-text": 0.25})
    diffuser.zero_grad()
    whole.total(whole.losses(diffuser, encoded, rng())).backward()
    together = {name: parameter.grad.clone() for name, parameter in diffuser.named_parameters()}
    diffuser.zero_grad()
    for name in (flow.name for flow in FLOWS):
        (whole.weights[name] * whole.losses(diffuser, encoded, rng())[name]).backward()
    assert whole.weights["text-to-text"] == 0.25
    for name, parameter in diffuser.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_noise_of_a_flow_does_not_depend_on_the_other_flows(diffuser: Diffuser, encoded: Encoded) -> None:
    """New flows do not change the losses of the earlier flows on the same batch and random numbers."""
    schedule = objective().schedule
    config = ObjectiveConfig(context_dropout=0.1, flow_weights={})
    with torch.no_grad():
        few = Objective(FLOWS[:1], schedule, Unconditional(), config).losses(diffuser, encoded, rng())
        many = Objective(FLOWS, schedule, Unconditional(), config).losses(diffuser, encoded, rng())
    torch.testing.assert_close(few[FLOWS[0].name], many[FLOWS[0].name], atol=1e-6, rtol=1e-6)


def test_perfect_predictions_have_no_loss(encoded: Encoded) -> None:
    def oracle(inputs: list[DiffuserInput]) -> list[torch.Tensor]:
        own = rng()
        return [
            torch.cat(
                [own.normal(f"noise/{flow}", item.latents.shape[1:]) for flow in FLOWS if flow.output == item.output]
            )
            for item in inputs
        ]

    losses = objective().losses(oracle, encoded, rng())
    assert set(losses) == {flow.name for flow in FLOWS}
    assert all(float(loss) == 0 for loss in losses.values())
