"""A trained model ready to sample.

model = VersatileDiffusion.from_checkpoint("tiny").to("cuda")
pictures = model.generate("text-to-image", "a red circle on a white background")  # Pillow's, shown by a notebook
captions = model.generate("image-to-text", ["photo.jpg", pictures[0]])
blended = model.blend("image", [("a yellow square", 0.4), (pictures[0], 0.6)])
edited, captions = model.edit(pictures, remove="red", add="blue")
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vdtrain.config.command_schema import SamplingConfig
from vdtrain.config.schema import ModelConfig
from vdtrain.config.validation import check_sampling
from vdtrain.diffusion import editing
from vdtrain.diffusion.arguments import (
    accepts_names_of_diffusers,
    check_number,
    check_output_type,
    drawn_seeds,
    seeds_of,
    typed_settings,
    whole,
)
from vdtrain.diffusion.contexts import focus as focused
from vdtrain.diffusion.contexts import joined_by_modality, make_mixing, normalised
from vdtrain.diffusion.sampling import Mixing, Progress, alone, denoise, guided, make_solver
from vdtrain.diffusion.schedule import Schedule
from vdtrain.errors import ConfigError, one_line
from vdtrain.flows import Flow, flow_of
from vdtrain.grid import Pictures as Pictures
from vdtrain.media import LATENTS, PICTURES, batch_of, is_text, presented, read_mask
from vdtrain.models.diffuser import Context, Diffuser, allocated, layer_group
from vdtrain.models.frozen import FrozenParts, build_frozen
from vdtrain.models.frozen_weights import compare
from vdtrain.training.start import open_weights
from vdtrain.weights.tensor_files import LazyTensors

TEXT, IMAGE = editing.TEXT, editing.IMAGE


@dataclass(frozen=True)
class ContextInput:
    """One context of a blend.

    Attributes:
        modality: of the context.
        sample: a caption, or an image in any form that `media.batch_of` takes, by the modality.
        weight: in the blend; only the ratio to the other weights matters.
        mask: for modalities whose encoder takes one, as `media.read_mask` takes it: 1 keeps a part of the image, 0
            hides it.
        focus: of an image context; see `VersatileDiffusion.generate`.
    """

    modality: str
    sample: Any
    weight: float = 1.0
    mask: Any = None
    focus: float = 0.5

    @classmethod
    def of(cls, given: Any) -> ContextInput:
        """A context as people write it: a caption or an image (of a file, a Path), alone or as (sample, weight).

        Raises:
            ConfigError: it is neither.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, tuple) and len(given) == 2:
            return replace(cls.of(given[0]), weight=given[1])
        if given is None or isinstance(given, int | float | Mapping | list | tuple):
            raise ConfigError(
                f"contexts: {given!r:.60} is no context; give a caption, an image, (sample, weight) or a ContextInput"
            )
        return cls(TEXT if isinstance(given, str) else IMAGE, given)


class VersatileDiffusion:
    """Diffuser, frozen parts and noise schedule, on one device.

    Samples are taken in the forms that `vdtrain.media.batch_of` names, one or several, and the methods `generate`,
    `blend` and `edit` have these keywords in common:

        output_type: "pil" (Pillow's images, in a list that a notebook shows), "tensor" (uint8 [B, 3, H, W]), "pt" and
            "np" (0..1, [B, 3, H, W] and [B, H, W, 3], as in diffusers) or "latent". Captions are always a list.
        generator: a torch.Generator, which the seeds are drawn from, or a list of one for each sample; instead of
            `seed`.
        progress: wraps the indices of the steps, e.g. in a progress bar.
        settings: fields of `SamplingConfig`: height, width (without them, the model's own resolution; `resolution` for
            both), steps, guidance_scale, solver, eta, seed, batch_size.

    diffusers' names of arguments are taken too: `vdtrain.diffusion.arguments.DIFFUSERS`. The random numbers of a sample
    depend only on the seed and on its index among the samples. A mistake is a ConfigError of one line.

    Args:
        config: of the whole model; names the frozen parts' weights.
        diffuser: must have the layers of the flows that will be sampled.
        device, dtype: see `to`.
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
        self.diffuser = diffuser.eval().requires_grad_(False)
        self.frozen = frozen or build_frozen(config)
        self.to(device, dtype)

    @classmethod
    def around(
        cls, config: ModelConfig, diffuser: Diffuser, frozen: FrozenParts, schedule: Schedule
    ) -> VersatileDiffusion:
        """Networks that are being trained, as they are: nothing is moved, converted or frozen."""
        model = cls.__new__(cls)
        model.config, model.diffuser, model.frozen, model.schedule = config, diffuser, frozen, schedule
        model.device = schedule.alphas_cumprod.device
        return model

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        weights: str = "ema",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust: Sequence[str] = (),
    ) -> VersatileDiffusion:
        """Load a run folder's latest checkpoint, a checkpoint folder, a weights folder, or "tiny", which comes along.

        Args:
            weights: "ema" (the moving average) or "model" (the trained weights).
            device, dtype: see `to`.
            trust: modules whose classes the checkpoint's model may name. Calling them can run anything.

        Raises:
            ConfigError: there is no complete checkpoint, it belongs to another model, or it names a class that is
                neither this package's own nor trusted.
        """
        path, device = os.fspath(path), usable(device)
        config, tensors = open_weights("checkpoint", path, weights, trust)
        # Without values first, so that memory holds a large model once, in the requested precision.
        diffuser = allocated(config, {layer_group(name) for name in tensors}, str(device), dtype)
        differences = compare(diffuser.state_dict(), LazyTensors.of(tensors).meta())
        if differences:
            raise ConfigError(f"checkpoint={path}: weights of another model: {differences}")
        for name, tensor in diffuser.state_dict().items():
            tensor.copy_(tensors[name])
        return cls(config, diffuser, device, dtype)

    def to(
        self,
        *where: torch.device | str | int | torch.dtype,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> VersatileDiffusion:
        """Move to a device, change the precision of the networks, or both; returns itself.

        The solver always works in float32.

        Raises:
            ConfigError: there is no such device, or no such precision.
        """
        for each in where:
            if isinstance(each, torch.dtype):
                dtype = each
            else:
                device = each
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"dtype={dtype!r}: choose torch.float32, torch.bfloat16 or torch.float16")
        if device is not None:
            self.device = usable(device)
            self.schedule = Schedule(self.config.schedule, self.device)
        self.diffuser.to(self.device, dtype)
        self.frozen.to(self.device, dtype)
        return self

    @accepts_names_of_diffusers
    def generate(
        self,
        flow: str,
        inputs: Any = None,
        *,
        samples_per_input: int = 1,
        focus: float = 0.5,
        start_from: Any = None,
        fidelity: float | None = None,
        negative_prompt: str | None = None,
        generator: Any = None,
        output_type: str = PICTURES,
        progress: Progress = list,
        **settings: Any,
    ) -> Any:
        """Samples of a flow, `samples_per_input` for each input; see the class for the other keywords.

        Args:
            flow: "text-to-image", "image-to-image", "image-to-text" or "text-to-text".
            inputs: of the flow's context.
            focus: semantic-style disentanglement of image contexts: 0 content, 0.5 unchanged, 1 style.
            start_from: samples of the output modality, one per input, that replace the initial noise.
            fidelity: how much of `start_from` remains under the noise: at 0 nothing, at 1 all of it.
            negative_prompt: what guidance leads away from, in place of the empty text.

        Raises:
            ConfigError: the model has no layers for the flow, an input is not of its context, or a setting is invalid.
        """
        wanted, chosen = self.flow(flow), self.settings(settings)
        check_output_type(output_type)
        times = whole("samples_per_input", samples_per_input)
        if negative_prompt is not None and (wanted.context != TEXT or not is_text(negative_prompt)):
            raise ConfigError(f"negative_prompt={negative_prompt!r:.60}: one text, for flows from text")
        size = chosen.height, chosen.width
        given = batch_of(wanted.context, inputs, (min(size), min(size)))
        seeds = drawn_seeds(generator, settings, chosen, len(given) * times)
        start = self._start(wanted.output, start_from, fidelity, size, len(given))
        if start is not None and fidelity == 1:
            kept = start if output_type != LATENTS else self.encode_latents(wanted.output, start, chosen.batch_size)
            return presented(wanted.output, _repeated(kept, times), output_type)
        tokens = _focused(self.encode_context(wanted.context, given, chosen.batch_size), focus)
        without = None if negative_prompt is None else [Context(TEXT, self.encode_context(TEXT, [negative_prompt]))]
        latents = None if start is None else self.encode_latents(wanted.output, start, chosen.batch_size)
        made = self.sample(
            wanted.output,
            [Context(wanted.context, tokens.repeat_interleave(times, 0))],
            chosen,
            unconditional=without,
            start=None if latents is None else latents.repeat_interleave(times, 0),
            fidelity=fidelity or 0.0,
            progress=progress,
            seeds=seeds,
            decode=output_type != LATENTS,
        )
        return presented(wanted.output, made, output_type)

    @accepts_names_of_diffusers
    def blend(
        self,
        output: str,
        inputs: Sequence[Any],
        *,
        count: int = 1,
        mixing: str = "attention",
        join: bool = True,
        generator: Any = None,
        output_type: str = PICTURES,
        progress: Progress = list,
        **settings: Any,
    ) -> Any:
        """Samples from several contexts: `count` images or captions, by `output`; see the class for other keywords.

        Args:
            inputs: each a `ContextInput`, or what `ContextInput.of` takes.
            mixing: "attention" averages the contexts at every context layer; "layer" draws one context for each layer.
            join: concatenate the tokens of contexts of one modality, as in the released application. Otherwise each
                context is mixed on its own.

        Raises:
            ConfigError: the model has no layers for a modality, an input is of another, or a setting is invalid.
        """
        chosen = self.settings(settings)
        check_output_type(output_type)
        listed = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        if not listed or whole("count", count, 0) < 1:
            raise ConfigError(f"contexts: {len(listed)} for {count} samples; give at least one of each")
        parts = [ContextInput.of(each) for each in listed]
        for each in parts:
            self.flow(Flow(output, each.modality).name)
            check_number("weight", each.weight)
        seeds, side = drawn_seeds(generator, settings, chosen, count), min(chosen.height, chosen.width)
        contexts = [self._context(each, side, f"contexts.{number}") for number, each in enumerate(parts)]
        weights = [each.weight for each in parts]
        normalised(weights)
        if join:
            contexts, weights = joined_by_modality(contexts, weights)
        mix = make_mixing(mixing, weights, len(self.diffuser.plan.context_steps), seeds[0])
        contexts = [Context(each.modality, each.tokens.expand(count, -1, -1)) for each in contexts]
        decode = output_type != LATENTS
        made = self.sample(output, contexts, chosen, mixing=mix, progress=progress, seeds=seeds, decode=decode)
        return presented(output, made, output_type)

    @accepts_names_of_diffusers
    def edit(
        self,
        images: Any,
        remove: str = "",
        add: str = "",
        *,
        text_share: float = 0.67,
        style_rank: int = 10,
        generator: Any = None,
        output_type: str = PICTURES,
        progress: Progress = list,
        **settings: Any,
    ) -> tuple[Any, list[str]]:
        """Edit images by words; see `vdtrain.diffusion.editing.edit`, and the class for the other keywords.

        Returns:
            The new images, and the captions of the changed latents.
        """
        chosen = self.settings(settings)
        check_output_type(output_type)
        check_number("text_share", text_share)
        whole("style_rank", style_rank)
        for name, words in (("remove", remove), ("add", add)):
            if not is_text(words):
                raise ConfigError(f"{name}={words!r:.60}: give one text")
        side = min(chosen.height, chosen.width)
        given = batch_of(IMAGE, images, (side, side), "images")
        made, captions = editing.edit(
            self,
            given,
            remove,
            add,
            text_share=text_share,
            style_rank=style_rank,
            seeds=drawn_seeds(generator, settings, chosen, len(given)),
            progress=progress,
            decode=output_type != LATENTS,
            **settings,
        )
        return presented(IMAGE, made, output_type), captions

    def _start(self, modality: str, given: Any, fidelity: float | None, size: tuple[int, int], count: int) -> Any:
        """The batch that replaces the noise; None if nothing of it would remain."""
        if fidelity is None and given is not None:
            raise ConfigError("start_from: nothing of it remains without fidelity; give fidelity from 0 to 1")
        if fidelity is None:
            return None
        if isinstance(fidelity, bool) or not isinstance(fidelity, int | float) or not 0 <= fidelity <= 1:
            raise ConfigError(f"fidelity={fidelity}: must be from 0 (noise) to 1 (start_from itself)")
        if fidelity == 0:
            return None
        start = None if given is None else batch_of(modality, given, size, "start_from")
        if start is None or len(start) != count:
            had = "nothing" if start is None else len(start)
            raise ConfigError(f"start_from: {had} for {count} inputs; fidelity={fidelity} needs one for each")
        if modality == IMAGE and tuple(start.shape[-2:]) != size:
            height, width = start.shape[-2:]
            raise ConfigError(f"start_from: {height} x {width}, for images of {size[0]} x {size[1]}; resize it to that")
        return start

    def _context(self, given: ContextInput, side: int, setting: str) -> Context:
        """The encoded context of a blend, of one row."""
        sample = given.sample
        if isinstance(sample, Tensor) and given.modality != IMAGE:
            sample = sample[None]
        batch = batch_of(given.modality, sample, (side, side), setting)
        if len(batch) != 1:
            raise ConfigError(f"{setting}: {len(batch)} samples; a context is one, give a context for each")
        masks = None if given.mask is None else read_mask(given.mask)[None]
        return Context(given.modality, _focused(self.encode_context(given.modality, batch, masks=masks), given.focus))

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
        seeds: Sequence[int] | None = None,
        decode: bool = True,
    ) -> Any:
        """Samples of a modality from encoded contexts; the other methods call this one.

        Args:
            contexts: tokens [B, M, D] each, for B samples.
            unconditional: for each of `contexts`, tokens [1, M, D]; None repeats the modality's own to that length.
            start: clean latents [B, ...] to begin from; `fidelity` (below 1) sets their noise.
            seeds: one for each sample; None for the successors of `settings.seed`.
            decode: False returns latents [B, ...], float32.

        Raises:
            ConfigError: the latents overflow.
        """
        if unconditional is None:
            unconditional = [self._unconditional(output, context) for context in contexts]
        count, parts = len(contexts[0].tokens), []
        seeds = seeds_of(None, settings.seed, count) if seeds is None else seeds
        shape = self.frozen.latent_shape(output, (settings.height, settings.width))
        for begin in range(0, count, settings.batch_size):
            rows = range(begin, min(begin + settings.batch_size, count))
            generators = [torch.Generator().manual_seed(seeds[row]) for row in rows]
            chunk = [Context(each.modality, each.tokens[rows.start : rows.stop]) for each in contexts]
            without = [Context(each.modality, each.tokens.expand(len(rows), -1, -1)) for each in unconditional]
            predict = guided(self.diffuser, output, chunk, without, settings.guidance_scale, mixing)
            latents = self._normal(shape, generators)
            drawn = lambda index, generators=generators: self._normal(shape, generators)  # noqa: E731
            solver = make_solver(settings.solver, self.schedule, settings.steps, settings.eta, drawn)
            first = 0
            if start is not None:
                # 0.9 of 50 leaves five steps, although the product is below 5 by a rounding error.
                first = len(solver.timesteps) - max(1, int(len(solver.timesteps) * (1 - fidelity) + 1e-6))
                timesteps = torch.full((len(rows),), solver.timesteps[first], device=self.device)
                latents = self.schedule.add_noise(start[rows.start : rows.stop], latents, timesteps)
            latents = denoise(predict, latents, solver, first, progress)
            self._check_finite(latents, settings.guidance_scale)
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

    def decode(self, modality: str, latents: Tensor, seeds: Sequence[int] | None = None) -> Any:
        """Samples of a modality from latents [B, ...]; random numbers depend only on a row's seed, or on its number."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(latents))]
        return self.frozen.decode(modality, latents, generators)

    def flow(self, name: str) -> Flow:
        """A flow by name; see `flow_of`."""
        diffuser = self.diffuser
        groups = [f"data.{each}" for each in diffuser.data_layers]
        groups += [f"context.{each}" for each in diffuser.context_layers]
        return flow_of("flow", name, groups, self.config.modalities)

    def unconditional(self, output: str, modality: str) -> Tensor:
        """The unconditional context [1, M, D] of `modality` for generating `output`."""
        return self.frozen.unconditional(Flow(output, modality), 1)

    def _unconditional(self, output: str, context: Context) -> Context:
        tokens = self.unconditional(output, context.modality)
        return Context(context.modality, tokens.repeat(1, context.tokens.shape[1] // tokens.shape[1], 1))

    def settings(self, changes: Mapping[str, Any]) -> SamplingConfig:
        """The default settings with changes, validated; images have the model's own resolution.

        Raises:
            ConfigError: a setting is invalid.
        """
        own = {"height": self.config.resolution, "width": self.config.resolution}
        settings = SamplingConfig(**{**own, **typed_settings(changes)})
        check_sampling(settings, self.config)
        return settings

    def _normal(self, shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
        """Unit normal noise [B, *shape], each row from its own generator, the same on every device."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

    def _check_finite(self, latents: Tensor, scale: float) -> None:
        """Refuse latents that have no sample: a decoder would make a black image of them, or an empty caption."""
        if not latents.isfinite().all():
            half = next(self.diffuser.parameters()).dtype == torch.float16
            other = "precision=bf16" if half else "other weights"
            raise ConfigError(f"guidance_scale={scale:g}: latents are not finite; choose a smaller one, or {other}")

    def _here(self, samples: Any) -> Any:
        return samples.to(self.device) if isinstance(samples, Tensor) else samples


def usable(device: torch.device | str | int) -> torch.device:
    """A device by name.

    Raises:
        ConfigError: there is none of that name here.
    """
    try:
        found = torch.device(device)
        if found.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device={device}: PyTorch finds no GPU here; choose cpu or repair the driver")
        torch.empty(0, device=found)
    except ConfigError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(f"device={device}: {one_line(error)[:100]}; choose cpu, cuda or cuda:1") from error
    return found


def _focused(tokens: Tensor, focus: Any) -> Tensor:
    check_number("focus", focus)
    return focused(tokens, focus)


def _repeated(batch: Any, times: int) -> Any:
    if isinstance(batch, Tensor):
        return batch.repeat_interleave(times, 0)
    return [each for each in batch for _ in range(times)]
