"""The losses of all flows against a computation flow by flow."""

import pytest
import torch

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import ObjectiveConfig, TrainConfig
from vdtrain.diffusion.objective import QUARTERS, Objective, QuarterLosses, StepRandom
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


@torch.no_grad()
def alone(flow: Flow, diffuser: Diffuser, encoded: Encoded, own: StepRandom) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared errors of a flow that goes through the network by itself, and its timesteps."""
    latents = encoded.latents[flow.output]
    noise = own.normal(f"noise/{flow}", latents.shape[1:])
    timesteps = own.integers(f"timestep/{flow}", 1000)
    tokens = encoded.contexts[flow.context].clone()
    tokens[own.chance(f"dropout/{flow}", 0.5)] = Unconditional().unconditional(flow, 1)
    noisy = objective().schedule.add_noise(latents, noise, timesteps)
    (out,) = diffuser([DiffuserInput(flow.output, noisy, timesteps, [Context(flow.context, tokens)])])
    return (out - noise).pow(2), timesteps


def test_flows_together_equal_flows_alone(diffuser: Diffuser, encoded: Encoded) -> None:
    with torch.no_grad():
        losses = objective().losses(diffuser, encoded, rng())
    own = rng()
    for flow in FLOWS:
        squares, _ = alone(flow, diffuser, encoded, own)
        torch.testing.assert_close(losses[flow.name], squares.mean(), atol=1e-6, rtol=1e-6)


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


@pytest.mark.parametrize("gamma", [0.1, 5.0, 1e9])
def test_min_snr_weights_are_those_of_a_plain_computation(diffuser: Diffuser, encoded: Encoded, gamma: float) -> None:
    whole = objective(min_snr_gamma=gamma, flow_weights={"text-to-text": 0.25})
    with torch.no_grad():
        losses, plain = whole.losses(diffuser, encoded, rng()), objective().losses(diffuser, encoded, rng())
    own, schedule = rng(), whole.schedule
    expected = {}
    for flow in FLOWS:
        latents = encoded.latents[flow.output]
        noise, timesteps = own.normal(f"noise/{flow}", latents.shape[1:]), own.integers(f"timestep/{flow}", 1000)
        tokens = encoded.contexts[flow.context].clone()
        tokens[own.chance(f"dropout/{flow}", 0.5)] = Unconditional().unconditional(flow, 1)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with torch.no_grad():
            (out,) = diffuser([DiffuserInput(flow.output, noisy, timesteps, [Context(flow.context, tokens)])])
        each = []
        for row, timestep in enumerate(timesteps.tolist()):
            kept = float(schedule.alphas_cumprod[timestep])
            ratio = kept / (1 - kept)
            each.append(min(ratio, gamma) / ratio * float((out[row] - noise[row]).double().pow(2).mean()))
        expected[flow.name] = sum(each) / BATCH
        assert float(losses[flow.name]) == pytest.approx(expected[flow.name], rel=1e-5)
    total = sum(loss * (0.25 if name == "text-to-text" else 1.0) for name, loss in expected.items())
    assert float(whole.total(losses)) == pytest.approx(total, rel=1e-5)
    assert (losses == plain) is (gamma == 1e9)


def test_the_schedule_is_rounded_once() -> None:
    """From float64 to float32; noisy latents in bf16 are those in float32, rounded."""
    schedule = objective().schedule
    roots = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * step / 999 for step in range(1000)]
    exact, kept = [], 1.0
    for root in roots:
        kept *= 1 - root**2
        exact.append(kept)
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor(exact), atol=0, rtol=1.2e-7)
    latents, noise = torch.randn(2, 500, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    steps = torch.arange(0, 1000, 2)
    whole = schedule.add_noise(latents.float(), noise.float(), steps)
    assert torch.equal(schedule.add_noise(latents, noise, steps), whole.bfloat16())


def test_offset_noise_shifts_the_channels_of_images_alone(encoded: Encoded) -> None:
    seen: list[dict[str, DiffuserInput]] = []

    def look(inputs: list[DiffuserInput]) -> list[torch.Tensor]:
        seen.append({item.output: item for item in inputs})
        return [torch.zeros_like(item.latents) for item in inputs]

    for strength in (0.0, 0.3, 0.3):
        whole = objective(offset_noise=strength)
        whole.losses(look, encoded, rng())
    plain, shifted, again = seen
    assert all(torch.equal(shifted[output].latents, again[output].latents) for output in ("image", "text"))
    assert torch.equal(plain["text"].latents, shifted["text"].latents)
    own, images = rng(), [flow for flow in FLOWS if flow.output == "image"]
    offsets = torch.cat([own.normal(f"offset/{flow}", (4, 1, 1)) for flow in images])
    kept = whole.schedule.alphas_cumprod[plain["image"].timesteps].view(-1, 1, 1, 1)
    difference = shifted["image"].latents - plain["image"].latents
    torch.testing.assert_close(difference, (0.3 * (1 - kept).sqrt() * offsets).expand_as(difference), atol=1e-6, rtol=0)


def test_losses_by_quarter_are_those_of_the_samples_alone(diffuser: Diffuser, encoded: Encoded) -> None:
    """In two steps together; the losses themselves keep every bit."""
    whole, names = objective(), [flow.name for flow in reversed(FLOWS)]
    quarters = QuarterLosses(names, whole.schedule.steps, torch.device("cpu"))
    expected = torch.zeros_like(quarters.sums)
    for step in range(2):
        with torch.no_grad():
            losses = whole.losses(diffuser, encoded, rng(step), quarters)
            again = whole.losses(diffuser, encoded, rng(step))
        assert all(torch.equal(losses[name], again[name]) for name in names)
        own = rng(step)
        for row, flow in enumerate(reversed(FLOWS)):
            squares, timesteps = alone(flow, diffuser, encoded, own)
            for sample, timestep in enumerate(timesteps.tolist()):
                error = float(squares[sample].double().mean())
                expected[row, timestep // (1000 // QUARTERS)] += torch.tensor([error, 1.0])
    torch.testing.assert_close(quarters.sums, expected, atol=0.0, rtol=1e-5)
    assert (quarters.sums[..., 1].sum(dim=1) == 2 * BATCH).all()


def test_quarters_of_a_schedule_that_four_does_not_divide() -> None:
    quarters = QuarterLosses(["a"], 10, torch.device("cpu"))
    quarters.add(["a"], torch.ones(10, 3), torch.arange(10))
    assert quarters.sums[0, :, 1].tolist() == [3, 2, 3, 2]


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
