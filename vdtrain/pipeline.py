"""A trained model ready to sample.

model = VersatileDiffusion.from_checkpoint("runs/stage3_four_flow")
images = model.generate("text-to-image", ["a red circle on a white background"], height=64, width=64)
captions = model.generate("image-to-text", images)
blended = model.blend("image", [ContextInput("text", "a red circle", 0.4), ContextInput("image", images[0], 0.6)])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vdtrain.config.schema import ModelConfig, SamplingConfig
from vdtrain.config.validation import check_sampling
from vdtrain.diffusion.contexts import focus as focused
from vdtrain.diffusion.contexts import joined_by_modality, make_mixing, normalised
from vdtrain.diffusion.sampling import Mixing, Progress, alone, denoise, guided, make_solver
from vdtrain.diffusion.schedule import Schedule
from vdtrain.errors import ConfigError
from vdtrain.flows import Flow
from vdtrain.models.diffuser import Context, Diffuser, allocated, layer_group
from vdtrain.models.frozen import FrozenParts, build_frozen
from vdtrain.models.frozen_weights import compare
from vdtrain.training.start import open_weights
from vdtrain.weights.tensor_files import LazyTensors


@dataclass(frozen=True)
class ContextInput:
    """One context of a blend.

    Attributes:
        modality: of the context.
        sample: a caption, or an image uint8 [3, H, W], by the modality.
        weight: in the blend; only the ratio to the other weights matters.
        mask: [1, h, w] in 0..1, for modalities whose encoder takes one: 1 keeps a part of the image, 0 hides it.
    """

    modality: str
    sample: Any
    weight: float = 1.0
    mask: Tensor | None = None

    def batch(self) -> Any:
        """The sample as a batch of one."""
        return self.sample[None] if isinstance(self.sample, Tensor) else [self.sample]

    def masks(self) -> Tensor | None:
        """The mask as a batch of one."""
        return None if self.mask is None else self.mask[None]


class VersatileDiffusion:
    """Diffuser, frozen parts and noise schedule, on one device.

    The methods take the fields of `SamplingConfig` as keywords: height, width, steps, guidance_scale, solver, eta,
    seed, batch_size. The random numbers of a sample depend only on the seed and on its index among the samples.

    Args:
        config: of the whole model; names the frozen parts' weights.
        diffuser: must have the layers of the flows that will be sampled.
        dtype: precision of the networks; the solver always works in float32.
        frozen: VAEs and context encoders; None builds those of `config`.
    """

    def __init__(
        self,
        config: ModelConfig,
        diffuser: Diffuser,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        frozen: FrozenParts | None = None,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.diffuser = diffuser.to(self.device, dtype).eval().requires_grad_(False)
        self.frozen = (frozen or build_frozen(config)).to(self.device, dtype)
        self.schedule = Schedule(config.schedule, self.device)

    @classmethod
    def from_checkpoint(
        cls, path: str, weights: str = "ema", device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> VersatileDiffusion:
        """Load a run folder's latest checkpoint, a checkpoint folder, or a weights folder.

        Args:
            weights: "ema" (the moving average) or "model" (the trained weights).

        Raises:
            ConfigError: there is no complete checkpoint, or it belongs to another model.
        """
        config, tensors = open_weights("checkpoint", path, weights)
        # Without values first, so that memory holds a large model once, in the requested precision.
        diffuser = allocated(config, {layer_group(name) for name in tensors}, device, dtype)
        differences = compare(diffuser.state_dict(), LazyTensors.of(tensors).meta())
        if differences:
            raise ConfigError(f"checkpoint={path}: weights of another model: {differences}")
        for name, tensor in diffuser.state_dict().items():
            tensor.copy_(tensors[name])
        return cls(config, diffuser, device, dtype)

    def generate(
        self,
        flow: str,
        inputs: Any,
        *,
        focus: float = 0.5,
        start_from: Any = None,
        fidelity: float = 0.0,
        progress: Progress = list,
        **settings: Any,
    ) -> Any:
        """One sample per input: uint8 [B, 3, H, W] images or a list of captions, by the flow's output.

        Args:
            flow: "text-to-image", "image-to-image", "image-to-text" or "text-to-text".
            inputs: captions, or uint8 [B, 3, h, w] images, by the flow's context.
            focus: semantic-style disentanglement of image contexts: 0 content, 0.5 unchanged, 1 style.
            start_from: samples of the output modality, one per input, that replace the initial noise. Images must have
                the requested size.
            fidelity: how much of `start_from` remains under the noise: at 0 nothing, at 1 all of it.
            settings: fields of `SamplingConfig`.

        Raises:
            ConfigError: the model has no layers for the flow, or a setting is invalid.
        """
        wanted, chosen = self.flow(flow), self.settings(settings)
        if not 0 <= fidelity <= 1:
            raise ConfigError(f"fidelity={fidelity}: must be from 0 (noise) to 1 (start_from itself)")
        start = None
        if fidelity > 0:
            if start_from is None or len(start_from) != len(inputs):
                given = "nothing" if start_from is None else len(start_from)
                raise ConfigError(
                    f"start_from: {given} for {len(inputs)} inputs; fidelity={fidelity} needs one for each"
                )
            if fidelity == 1:
                return start_from
            start = self.encode_latents(wanted.output, start_from, chosen.batch_size)
        tokens = self.encode_context(wanted.context, inputs, chosen.batch_size)
        try:
            tokens = focused(tokens, focus)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        contexts = [Context(wanted.context, tokens)]
        return self.sample(wanted.output, contexts, chosen, start=start, fidelity=fidelity, progress=progress)

    def blend(
        self,
        output: str,
        inputs: Sequence[ContextInput],
        *,
        count: int = 1,
        mixing: str = "attention",
        join: bool = True,
        progress: Progress = list,
        **settings: Any,
    ) -> Any:
        """Samples from several contexts: `count` images or captions, by `output`.

        Args:
            mixing: "attention" averages the contexts at every context layer; "layer" draws one context for each layer.
            join: concatenate the tokens of contexts of one modality, as in the released application. Otherwise each
                context is mixed on its own.

        Raises:
            ConfigError: the model has no layers for a modality, or a setting is invalid.
        """
        chosen = self.settings(settings)
        if not inputs or count < 1:
            raise ConfigError(f"contexts: {len(inputs)} for {count} samples; give at least one of each")
        for each in inputs:
            self.flow(Flow(output, each.modality).name)
        contexts = [
            Context(each.modality, self.encode_context(each.modality, each.batch(), masks=each.masks()))
            for each in inputs
        ]
        weights = [each.weight for each in inputs]
        try:
            normalised(weights)
            if join:
                contexts, weights = joined_by_modality(contexts, weights)
            mix = make_mixing(mixing, weights, len(self.diffuser.plan.context_steps), chosen.seed)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        contexts = [Context(each.modality, each.tokens.expand(count, -1, -1)) for each in contexts]
        return self.sample(output, contexts, chosen, mixing=mix, progress=progress)

    def sample(
        self,
        output: str,
        contexts: Sequence[Context],
        settings: SamplingConfig,
        *,
        unconditional: Sequence[Context] | None = None,
        mixing: Mixing = alone,
        start: Tensor | None = None,
        fidelity: float = 0.0,
        progress: Progress = list,
        decode: bool = True,
    ) -> Any:
        """Samples of a modality from encoded contexts; the other methods call this one.

        Args:
            contexts: tokens [B, M, D] each, for B samples.
            unconditional: for each of `contexts`, tokens [1, M, D]; None repeats the modality's own to that length.
            start: clean latents [B, ...] to begin from; `fidelity` (below 1) sets their noise.
            decode: False returns latents [B, ...], float32.
        """
        if unconditional is None:
            unconditional = [self._unconditional(output, context) for context in contexts]
        count, parts = len(contexts[0].tokens), []
        shape = self.frozen.latent_shape(output, (settings.height, settings.width))
        for begin in range(0, count, settings.batch_size):
            rows = range(begin, min(begin + settings.batch_size, count))
            generators = [torch.Generator().manual_seed(settings.seed + row) for row in rows]
            chunk = [Context(each.modality, each.tokens[rows.start : rows.stop]) for each in contexts]
            without = [Context(each.modality, each.tokens.expand(len(rows), -1, -1)) for each in unconditional]
            predict = guided(self.diffuser, output, chunk, without, settings.guidance_scale, mixing)
            latents = self._normal(shape, generators)
            drawn = lambda index, generators=generators: self._normal(shape, generators)  # noqa: E731
            solver = make_solver(settings.solver, self.schedule, settings.steps, settings.eta, drawn)
            first = 0
            if start is not None:
                first = len(solver.timesteps) - max(1, int(len(solver.timesteps) * (1 - fidelity)))
                timesteps = torch.full((len(rows),), solver.timesteps[first], device=self.device)
                latents = self.schedule.add_noise(start[rows.start : rows.stop], latents, timesteps)
            latents = denoise(predict, latents, solver, first, progress)
            parts.append(self.frozen.decode(output, latents, generators) if decode else latents)
        return torch.cat(parts) if isinstance(parts[0], Tensor) else [each for part in parts for each in part]

    def encode_context(self, modality: str, samples: Any, batch_size: int = 8, masks: Tensor | None = None) -> Tensor:
        """Context tokens [B, M, D] of samples of a modality.

        Args:
            masks: [B, 1, h, w] in 0..1, for modalities whose encoder takes them.

        Raises:
            ConfigError: the modality's encoder takes no masks.
        """
        if masks is not None:
            return self.frozen.encode_masked(modality, self._here(samples), masks.to(self.device))
        chunks = [samples[begin : begin + batch_size] for begin in range(0, len(samples), batch_size)]
        return torch.cat(
            [self.frozen.encode({modality: self._here(chunk)}, (), (modality,)).contexts[modality] for chunk in chunks]
        )

    def encode_latents(self, modality: str, samples: Any, batch_size: int = 8) -> Tensor:
        """Mean latents [B, ...] of samples of a modality."""
        chunks = [samples[begin : begin + batch_size] for begin in range(0, len(samples), batch_size)]
        return torch.cat(
            [self.frozen.encode({modality: self._here(chunk)}, (modality,), ()).latents[modality] for chunk in chunks]
        )

    def decode(self, modality: str, latents: Tensor, seed: int = 0) -> Any:
        """Samples of a modality from latents [B, ...]; random numbers depend only on the seed and the row."""
        generators = [torch.Generator().manual_seed(seed + row) for row in range(len(latents))]
        return self.frozen.decode(modality, latents, generators)

    def flow(self, name: str) -> Flow:
        """A flow by name.

        Raises:
            ConfigError: the name is not a flow, or the model has no layers for it.
        """
        try:
            flow = Flow.parse(name)
        except ValueError as error:
            raise ConfigError(f"flow={name}: {error}") from error
        for part, layers in ((flow.output, self.diffuser.data_layers), (flow.context, self.diffuser.context_layers)):
            if part not in layers:
                raise ConfigError(f"flow={name}: this checkpoint has no layers for {part!r}; sample from a later stage")
        return flow

    def unconditional(self, output: str, modality: str) -> Tensor:
        """The unconditional context [1, M, D] of `modality` for generating `output`."""
        return self.frozen.unconditional(Flow(output, modality), 1)

    def _unconditional(self, output: str, context: Context) -> Context:
        tokens = self.unconditional(output, context.modality)
        return Context(context.modality, tokens.repeat(1, context.tokens.shape[1] // tokens.shape[1], 1))

    def settings(self, changes: Mapping[str, Any]) -> SamplingConfig:
        """The default settings with changes, validated.

        Raises:
            ConfigError: a setting is invalid.
        """
        settings = replace(SamplingConfig(), **changes)
        check_sampling(settings, self.config)
        return settings

    def _normal(self, shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
        """Unit normal noise [B, *shape], each row from its own generator, the same on every device."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

    def _here(self, samples: Any) -> Any:
        return samples.to(self.device) if isinstance(samples, Tensor) else samples
