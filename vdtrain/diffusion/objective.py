"""The training objective: every flow of a stage predicts the noise in its output latent from its context.

Versatile Diffusion, section 3.3: each flow's loss is the mean squared error of the predicted noise, with a weight for
each flow. The gradients of all flows accumulate into one update. Flows with the same output modality share their data
layers, which process them in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    def _generator(self, purpose: str) -> torch.Generator:
        return generator_of(self.key, purpose, device=self.device)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Unit normal noise [rows, *shape], float32."""
        generator = self._generator(purpose)
        return torch.randn(self.global_batch_size, *shape, generator=generator, device=self.device)[self.rows]

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform integers in [0, high), [rows]."""
        generator = self._generator(purpose)
        return torch.randint(high, (self.global_batch_size,), generator=generator, device=self.device)[self.rows]

    def chance(self, purpose: str, probability: float) -> Tensor:
        """True with the given probability, [rows]."""
        generator = self._generator(purpose)
        return torch.rand(self.global_batch_size, generator=generator, device=self.device)[self.rows] < probability


Denoiser = Callable[[Sequence[DiffuserInput]], list[Tensor]]


class Objective:
    """Losses of a set of flows on one micro-batch."""

    def __init__(self, flows: Sequence[Flow], schedule: Schedule, frozen: FrozenParts, config: ObjectiveConfig) -> None:
        self.flows = by_output(flows)
        self.schedule = schedule
        self.frozen = frozen
        self.context_dropout = config.context_dropout
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
    ) -> Encoded:
        """Latents and contexts of a micro-batch; all flows share them.

        Args:
            moments: cached moments by modality. They replace the VAE's encoding of the samples.
        """
        noise = {
            output: rng.normal(f"latent/{output}", self.frozen.latent_shape(output, (resolution, resolution)))
            for output in sorted(self.outputs)
        }
        return self.frozen.encode(samples, self.outputs, self.contexts, noise, moments)

    def losses(self, denoiser: Denoiser, encoded: Encoded, rng: StepRandom) -> dict[str, Tensor]:
        """The unweighted mean squared error of each flow, a float32 scalar, by flow name."""
        inputs, noises = [], []
        for output, flows in self.flows.items():
            latents = encoded.latents[output]
            noise = torch.cat([rng.normal(f"noise/{flow}", latents.shape[1:]) for flow in flows])
            timesteps = torch.cat([rng.integers(f"timestep/{flow}", self.schedule.steps) for flow in flows])
            noisy = self.schedule.add_noise(latents.repeat(len(flows), *[1] * (latents.ndim - 1)), noise, timesteps)
            contexts = [Context(flow.context, self._context(flow, encoded, rng)) for flow in flows]
            inputs.append(DiffuserInput(output, noisy, timesteps, contexts))
            noises.append(noise)
        losses: dict[str, Tensor] = {}
        for (_, flows), predicted, noise in zip(self.flows.items(), denoiser(inputs), noises, strict=True):
            squares = (predicted.float() - noise).pow(2).chunk(len(flows))
            losses |= {flow.name: square.mean() for flow, square in zip(flows, squares, strict=True)}
        return losses

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum that is back-propagated."""
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()

    def _context(self, flow: Flow, encoded: Encoded, rng: StepRandom) -> Tensor:
        """The flow's context tokens [B, M, D]; context dropout replaces some rows by the unconditional context."""
        tokens = encoded.contexts[flow.context]
        dropped = rng.chance(f"dropout/{flow}", self.context_dropout)
        if flow not in self._unconditional:
            self._unconditional[flow] = self.frozen.unconditional(flow, 1).to(tokens)
        return torch.where(dropped[:, None, None], self._unconditional[flow], tokens)
