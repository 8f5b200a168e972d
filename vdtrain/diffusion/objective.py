"""The training objective: every flow of a stage predicts the noise in its output latent from its context.

Versatile Diffusion, section 3.3: each flow's loss is the mean squared error of the predicted noise, with a weight for
each flow, and for each timestep if `objective.min_snr_gamma` asks for it. The gradients of all flows accumulate into
one update. Flows with the same output modality share their data
layers, which process them in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdtrain.config.schema import ObjectiveConfig
from vdtrain.diffusion.schedule import Schedule
from vdtrain.flows import Flow, by_output
from vdtrain.models.diffuser import Context, DiffuserInput
from vdtrain.models.frozen import Encoded, FrozenParts
from vdtrain.seeds import generator_of


class StepRandom:
    """The random numbers of one step, for the rows `rows` of its global batch.

    Every call draws for the whole global batch from its own generator, keyed by (seed, step, purpose). It returns this
    rank's rows. A sample's noise therefore depends only on its position in the data. Any number of ranks can repeat a
    step at any time.
    """

    def __init__(self, seed: str, step: int, global_batch_size: int, rows: slice, device: torch.device) -> None:
        self.key = f"{seed}/{step}"
        self.global_batch_size = global_batch_size
        self.rows = rows
        self.device = device

    def _source(self, purpose: str) -> dict[str, Any]:
        return {"generator": generator_of(self.key, purpose, device=self.device), "device": self.device}

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Unit normal noise [rows, *shape], float32."""
        return torch.randn(self.global_batch_size, *shape, **self._source(purpose))[self.rows]

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform integers in [0, high), [rows]."""
        return torch.randint(high, (self.global_batch_size,), **self._source(purpose))[self.rows]

    def chance(self, purpose: str, probability: float) -> Tensor:
        """True with the given probability, [rows]."""
        return torch.rand(self.global_batch_size, **self._source(purpose))[self.rows] < probability


Denoiser = Callable[[Sequence[DiffuserInput]], list[Tensor]]
# Parts of the timesteps, from the least noise to the most, whose losses are measured apart.
QUARTERS = 4


class QuarterLosses:
    """Adds up what the samples lose in each quarter of the timesteps. Nothing here waits for the device.

    Args:
        flows: names, in the order of the sums.
        steps: number of diffusion steps.

    Attributes:
        sums: float64 [flows, QUARTERS, 2]: the sum of the samples' mean squared errors, and the number of samples.
    """

    def __init__(self, flows: Sequence[str], steps: int, device: torch.device) -> None:
        self._rows, self._steps = {name: row for row, name in enumerate(flows)}, steps
        self._numbers = torch.arange(QUARTERS, device=device)
        self.sums = torch.zeros(len(flows), QUARTERS, 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, flows: Sequence[str], squares: Tensor, timesteps: Tensor) -> None:
        """Add the squared errors [flows x B, ...] of flows one after another, at `timesteps` [flows x B]."""
        shape = (len(flows), -1, 1)
        errors = squares.flatten(1).mean(dim=1).view(shape)
        inside = timesteps.view(shape) * QUARTERS // self._steps == self._numbers
        found = torch.stack([torch.where(inside, errors, 0.0), inside.to(errors.dtype)], dim=-1).sum(dim=1)
        for name, sums in zip(flows, found, strict=True):
            self.sums[self._rows[name]] += sums


@dataclass(frozen=True)
class _Part:
    """The rows of a flow in a micro-batch; `counts`: whether they are those of pairs."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    context: Context
    counts: bool = True


class Objective:
    """Losses of a set of flows on one micro-batch."""

    def __init__(self, flows: Sequence[Flow], schedule: Schedule, frozen: FrozenParts, config: ObjectiveConfig) -> None:
        self.flows = by_output(flows)
        self.schedule = schedule
        self.frozen = frozen
        self.context_dropout, self.offset_noise = config.context_dropout, config.offset_noise
        self.min_snr_gamma = config.min_snr_gamma
        self.weights = {flow.name: config.flow_weights.get(flow.name, 1.0) for flow in flows}
        self.outputs = set(self.flows)
        self.contexts = {flow.context for flow in flows}
        self._unconditional: dict[Flow, Tensor] = {}

    def prepare(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """A batch's samples after their CPU work, in a form that `encode` also accepts."""
        return self.frozen.prepare(samples, self.outputs, self.contexts)

    def encode(
        self,
        samples: Mapping[str, object],
        resolution: int,
        rng: StepRandom,
        moments: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> Encoded:
        """Latents and contexts of a micro-batch; all flows share them.

        Args:
            moments: cached moments by modality. They replace the VAE's encoding of the samples.
            rows: of modalities that some pairs lack; see `vdtrain.data.batch.Batch`.
        """
        rows = rows or {}
        noise = {
            output: rng.normal(f"latent/{output}", self.frozen.latent_shape(output, (resolution, resolution)))
            for output in sorted(self.outputs)
        }
        noise = {name: each[rows[name]] if name in rows else each for name, each in noise.items()}
        absent = {name for name, each in rows.items() if len(each) == 0}
        encoded = self.frozen.encode(samples, self.outputs - absent, self.contexts - absent, noise, moments)
        if not rows:
            return encoded
        given = [*encoded.latents.values(), *encoded.contexts.values(), *noise.values()]
        empty = {name: noise[name].new_zeros(1, *noise[name].shape[1:]).to(given[0].dtype) for name in noise}
        latents = {name: empty[name] if name in absent else encoded.latents[name] for name in self.outputs}
        return Encoded(latents, encoded.contexts, rows)

    def losses(
        self, denoiser: Denoiser, encoded: Encoded, rng: StepRandom, quarters: QuarterLosses | None = None
    ) -> dict[str, Tensor]:
        """The mean squared error of each flow, a float32 scalar, by flow name; without the flow's weight.

        The mean is over the pairs that have both of the flow's modalities. If there are none, the flow's layers still
        run, on a row without meaning, and the loss is 0: every process reduces the gradients of the same layers.

        Args:
            quarters: receives the errors by quarter of the timesteps, without the weights of `min_snr_gamma`.
        """
        inputs, targets = [], []
        for output, flows in self.flows.items():
            parts = [self._part(flow, encoded, rng) for flow in flows]
            noise, timesteps = torch.cat([each.noise for each in parts]), torch.cat([each.timesteps for each in parts])
            noisy = self.schedule.add_noise(torch.cat([each.latents for each in parts]), noise, timesteps)
            inputs.append(DiffuserInput(output, noisy, timesteps, [each.context for each in parts]))
            targets.append((parts, noise, timesteps))
        losses: dict[str, Tensor] = {}
        for flows, predicted, target in zip(self.flows.values(), denoiser(inputs), targets, strict=True):
            parts, noise, timesteps = target
            sizes = [len(each.timesteps) for each in parts]
            squares = (predicted.float() - noise).pow(2)
            if quarters is not None and not encoded.rows:
                quarters.add([flow.name for flow in flows], squares, timesteps)
            elif quarters is not None:
                # Flows have different numbers of pairs.
                rows = zip(flows, parts, squares.split(sizes), timesteps.split(sizes), strict=True)
                for flow, part, own, times in rows:
                    if part.counts:
                        quarters.add([flow.name], own, times)
            if self.min_snr_gamma is not None:
                weights = self.schedule.min_snr(timesteps, self.min_snr_gamma)
                squares = squares * weights.view(-1, *[1] * (squares.ndim - 1))
            for flow, part, own in zip(flows, parts, squares.split(sizes), strict=True):
                losses[flow.name] = own.mean() if part.counts else 0.0 * own.mean()
        return losses

    def _part(self, flow: Flow, encoded: Encoded, rng: StepRandom) -> _Part:
        """What a flow makes of a micro-batch: the rows of the pairs that have both of its modalities."""
        latents, pairs = encoded.latents[flow.output], encoded.pairs_of(flow)
        noise = self._noise(flow, latents.shape[1:], rng)
        timesteps = rng.integers(f"timestep/{flow}", self.schedule.steps)
        dropped = rng.chance(f"dropout/{flow}", self.context_dropout)
        if pairs is not None and len(pairs) == 0:
            nothing = self._without(flow, latents)
            return _Part(latents[:1], noise[:1], timesteps[:1], Context(flow.context, nothing), counts=False)
        tokens = encoded.contexts[flow.context]
        if pairs is not None:
            latents, tokens = latents[encoded.of(flow.output, pairs)], tokens[encoded.of(flow.context, pairs)]
            noise, timesteps, dropped = noise[pairs], timesteps[pairs], dropped[pairs]
        tokens = torch.where(dropped[:, None, None], self._without(flow, tokens), tokens)
        return _Part(latents, noise, timesteps, Context(flow.context, tokens))

    def _noise(self, flow: Flow, shape: Sequence[int], rng: StepRandom) -> Tensor:
        """The noise [rows, *shape] of a flow, with a shift of each channel if latents are images (C, H, W)."""
        noise = rng.normal(f"noise/{flow}", shape)
        if self.offset_noise > 0 and len(shape) == 3:
            noise = noise + self.offset_noise * rng.normal(f"offset/{flow}", (shape[0], 1, 1))
        return noise

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum that is back-propagated."""
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()

    def _without(self, flow: Flow, like: Tensor) -> Tensor:
        """The unconditional context [1, M, D] of a flow, which context dropout puts in the place of some rows.

        It is kept with the device and the dtype of `like`, which are the same in all steps.
        """
        if flow not in self._unconditional:
            self._unconditional[flow] = self.frozen.unconditional(flow, 1).to(like)
        return self._unconditional[flow]
