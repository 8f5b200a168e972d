"""Flows on pairs of which some lack a modality, against the same pairs alone."""

from __future__ import annotations

import pytest
import torch

from tests.diffusion.test_objective import BATCH, FLOWS, Unconditional, alone, diffuser, encoded, objective, rng
from vdtrain.diffusion.objective import QuarterLosses
from vdtrain.flows import Flow
from vdtrain.models.diffuser import Context, Diffuser, DiffuserInput
from vdtrain.models.frozen import Encoded

__all__ = ["diffuser", "encoded"]

# Pairs 0 and 2 have an image, pairs 1, 2 and 3 a caption.
ROWS = {"image": torch.tensor([0, 2]), "text": torch.tensor([1, 2, 3])}


def lacking(encoded: Encoded, rows: dict[str, torch.Tensor]) -> Encoded:
    """Of each modality, what the pairs with it have."""
    latents = {name: each[rows[name]] if name in rows else each for name, each in encoded.latents.items()}
    contexts = {name: each[rows[name]] if name in rows else each for name, each in encoded.contexts.items()}
    return Encoded(latents, contexts, rows)


@pytest.mark.parametrize("rows", [ROWS, {"text": ROWS["text"]}, {"image": ROWS["image"]}])
def test_a_flow_trains_on_the_pairs_that_have_both_sides(
    diffuser: Diffuser, encoded: Encoded, rows: dict[str, torch.Tensor]
) -> None:
    quarters = QuarterLosses([flow.name for flow in FLOWS], 1000, torch.device("cpu"))
    with torch.no_grad():
        losses = objective().losses(diffuser, lacking(encoded, rows), rng(), quarters)
    for number, flow in enumerate(FLOWS):
        squares, _ = alone(flow, diffuser, encoded, rng())
        pairs = [
            row
            for row in range(BATCH)
            if all(part not in rows or row in rows[part].tolist() for part in (flow.output, flow.context))
        ]
        torch.testing.assert_close(losses[flow.name], squares[pairs].mean(), atol=1e-6, rtol=1e-6)
        assert quarters.sums[number, :, 1].sum() == len(pairs)
        assert quarters.sums[number, :, 0].sum() == pytest.approx(float(squares[pairs].flatten(1).mean(1).sum()))


def test_without_any_pair_a_loss_is_zero_and_every_layer_still_has_a_gradient(
    diffuser: Diffuser, encoded: Encoded
) -> None:
    rows = {"image": torch.tensor([], dtype=torch.int64)}
    some = Encoded(
        {"image": torch.zeros(1, 4, 4, 4), "text": encoded.latents["text"]}, {"text": encoded.contexts["text"]}, rows
    )
    whole, quarters = objective(), QuarterLosses([flow.name for flow in FLOWS], 1000, torch.device("cpu"))
    losses = whole.losses(diffuser, some, rng(), quarters)
    assert {name for name, loss in losses.items() if loss == 0} == {f.name for f in FLOWS} - {"text-to-text"}
    gradients = torch.autograd.grad(whole.total(losses), list(diffuser.parameters()), allow_unused=True)
    unused = [name for (name, _), each in zip(diffuser.named_parameters(), gradients, strict=True) if each is None]
    assert unused == []
    assert quarters.sums[:, :, 1].sum(dim=1).tolist() == [BATCH if f.name == "text-to-text" else 0 for f in FLOWS]


def test_whole_pairs_lose_to_the_bit_what_plain_code_loses(diffuser: Diffuser, encoded: Encoded) -> None:
    """As the objective was before pairs could lack anything; full rows change nothing either."""
    whole = objective()
    with torch.no_grad():
        losses = whole.losses(diffuser, encoded, rng())
        full = {name: torch.arange(BATCH) for name in ("image", "text")}
        also = whole.losses(diffuser, lacking(encoded, full), rng())
    own, expected = rng(), {}
    with torch.no_grad():
        for output, flows in whole.flows.items():
            latents = encoded.latents[output]
            noise = torch.cat([own.normal(f"noise/{flow}", latents.shape[1:]) for flow in flows])
            timesteps = torch.cat([own.integers(f"timestep/{flow}", 1000) for flow in flows])
            repeated = latents.repeat(len(flows), *[1] * (latents.ndim - 1))
            noisy = whole.schedule.add_noise(repeated, noise, timesteps)
            contexts = [Context(flow.context, dropped(flow, encoded)) for flow in flows]
            (predicted,) = diffuser([DiffuserInput(output, noisy, timesteps, contexts)])
            for flow, squares in zip(flows, (predicted.float() - noise).pow(2).chunk(len(flows)), strict=True):
                expected[flow.name] = squares.mean()
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    assert all(torch.equal(also[name], loss) for name, loss in expected.items())
    assert losses.keys() == expected.keys()


def dropped(flow: Flow, encoded: Encoded) -> torch.Tensor:
    nothing = objective()._without(flow, encoded.contexts[flow.context])
    return torch.where(rng().chance(f"dropout/{flow}", 0.5)[:, None, None], nothing, encoded.contexts[flow.context])


class Drawn(Unconditional):
    """Latents that are the noise of the posterior itself, in bfloat16."""

    def latent_shape(self, modality: str, size: tuple[int, int]) -> tuple[int, ...]:
        return {"image": (4, size[0] // 8, size[1] // 8), "text": (64,)}[modality]

    def encode(self, samples: object, outputs: set[str], contexts: set[str], noise: dict, moments: object) -> Encoded:
        return Encoded(
            {name: noise[name].bfloat16() for name in outputs},
            {name: torch.zeros(len(noise[name]), 5, 64, dtype=torch.bfloat16) for name in contexts},
        )


def test_a_latent_is_drawn_by_its_place_in_the_batch_whatever_others_lack() -> None:
    whole = objective()
    whole.frozen = Drawn()
    images, texts = (rng().normal(f"latent/{name}", shape) for name, shape in (("image", (4, 4, 4)), ("text", (64,))))
    for rows in ({}, ROWS, {"image": torch.tensor([], dtype=torch.int64)}):
        found = whole.encode({}, 32, rng(), rows=rows)
        every = torch.arange(BATCH)
        for name, drawn in (("image", images), ("text", texts)):
            expected = drawn[rows.get(name, every)].bfloat16()
            # A modality that no pair has is one row without meaning, of the same type.
            torch.testing.assert_close(
                found.latents[name], expected if len(expected) else expected.new_zeros(1, 4, 4, 4), atol=0, rtol=0
            )
