"""The contestants of train_step.py: a plain training script with diffusers' U-Nets or our diffuser, and the trainer.

All of them train the same weights on the same pairs with the same random numbers, so that their losses must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.config.validation import check_settings, gradient_scales, stage_flows
from vdtrain.data.batch import Batch
from vdtrain.diffusion.objective import Objective, StepRandom
from vdtrain.diffusion.schedule import Schedule
from vdtrain.flows import Flow, all_flows
from vdtrain.models.diffuser import Diffuser, DiffuserInput, parameters_by_group
from vdtrain.models.frozen import Encoded, FrozenParts, build_frozen
from vdtrain.models.image_layers import ImageDataLayers
from vdtrain.run.distributed import RankInfo
from vdtrain.tracking.speed import StepClock
from vdtrain.training.build import build_trainer, starting_diffuser
from vdtrain.training.start import Start
from vdtrain.weights.published.diffusers_folder import meta_unet
from vdtrain.weights.published.diffusers_names import UnetNames

CPU = torch.device("cpu")
EMA_DECAY = 0.9999


@dataclass
class Work:
    """What every contestant does in a step.

    Attributes:
        words: settings of the run, as `vdtrain train` takes them.
        samples: a batch of pairs, pixels uint8 and captions.
        frozen: whose weights all contestants' encoders have.
    """

    words: list[str]
    samples: dict[str, Any]
    frozen: FrozenParts

    @classmethod
    def make(cls, words: Sequence[str]) -> Work:
        config = to_object(compose("train", list(words)), TrainConfig)
        side, batch = config.stage.phases[0].resolution, config.stage.global_batch_size
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
        captions = [f"a red circle above a blue square, number {index}" for index in range(batch)]
        torch.manual_seed(0)
        return cls(list(words), {"image": images, "text": captions}, build_frozen(config.model))

    def config(self, more: Sequence[str] = ()) -> tuple[TrainConfig, DictConfig]:
        """The configuration with more settings.

        Raises:
            ConfigError: a setting does not exist, or has no such value.
        """
        raw_config = compose("train", [*self.words, *more])
        config = to_object(raw_config, TrainConfig)
        check_settings(config, 1)
        return config, raw_config


class Unets(nn.Module):
    """diffusers' U-Nets, one for each flow, on the parameters of a diffuser.

    diffusers' pipelines keep two U-Nets and exchange their attention blocks where output and context differ. Four that
    share their parameters are the same networks, and each can be compiled.
    """

    def __init__(self, diffuser: Diffuser, model: ModelConfig, compiled: bool = False) -> None:
        super().__init__()
        self.networks = nn.ModuleDict()
        parameters = dict(diffuser.named_parameters())
        for flow in all_flows(model.modalities):
            flat = not isinstance(diffuser.data_layers[flow.output], ImageDataLayers)
            names = UnetNames(diffuser.plan, "flat" if flat else "image", flow.output, flow.context)
            network = meta_unet(model, diffuser, names)
            state = {key: tensor for name, tensor in parameters.items() if (key := names.to_diffusers(name))}
            network.load_state_dict(state, assign=True)
            if compiled:
                network.compile(dynamic=False)
            self.networks[f"{flow.context}-{flow.output}"] = network
        theirs = {id(parameter) for parameter in self.parameters()}
        if theirs != {id(parameter) for parameter in parameters.values()}:
            raise ValueError("diffusers' U-Nets do not hold the diffuser's parameters")

    def forward(self, inputs: Sequence[DiffuserInput]) -> list[Tensor]:
        """Predicted noise, as `Diffuser` returns it, of inputs with one context each."""
        return [self._predict(each) for each in inputs]

    def _predict(self, given: DiffuserInput) -> Tensor:
        (context,) = given.contexts
        # A text latent is an image of one pixel there.
        latents = given.latents if given.latents.ndim == 4 else given.latents[..., None, None]
        network = self.networks[f"{context.modality}-{given.output}"]
        out: Tensor = network(latents, given.timesteps, context.tokens).sample
        return out.reshape(given.latents.shape)


class Contestant:
    """A way to do the work.

    Attributes:
        parameters: how many numbers it trains.
    """

    parameters: int

    def flows(self) -> object:
        """Forward and backward of all flows, on latents and contexts that are there already."""
        raise NotImplementedError

    def discard(self) -> None:
        """Forget the gradients of `flows`."""
        raise NotImplementedError

    def step(self) -> dict[str, float]:
        """Pixels and captions to updated weights; the losses by flow."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what outlives the object."""


class Script(Contestant):
    """A plain training script: the flows one after another, AdamW over all tensors, an average of all tensors.

    Args:
        network: "unets", "compiled unets", or "diffuser".
        optimizer: "foreach" or "fused".
        encode_once: share latents and contexts among the flows; otherwise each flow encodes what it needs.
        together: send the flows with one output through the network in one batch.
    """

    def __init__(
        self,
        work: Work,
        *,
        network: str = "unets",
        optimizer: str = "foreach",
        encode_once: bool = False,
        together: bool = False,
    ) -> None:
        self.config, _ = work.config()
        self.samples = work.samples
        diffuser = starting_diffuser(self.config, Start(), CPU)
        self.network = diffuser if network == "diffuser" else Unets(diffuser, self.config.model, network != "unets")
        flows, schedule = stage_flows(self.config), Schedule(self.config.model.schedule)

        def objective(part: Sequence[Flow]) -> Objective:
            return Objective(part, schedule, work.frozen, self.config.objective)

        self.whole = objective(flows)
        self.parts = [self.whole] if together else [objective([flow]) for flow in flows]
        self.encode_once = encode_once
        self.trained = list(diffuser.parameters())
        self.parameters = sum(parameter.numel() for parameter in self.trained)
        self.averages = [parameter.detach().clone() for parameter in self.trained]
        settings, scales = self.config.optimizer, gradient_scales(self.config)
        rate = self.config.stage.learning_rate * settings.learning_rate_scale
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(parameters.values()), "lr": rate * scales[group]}
                for group, parameters in parameters_by_group(diffuser).items()
            ],
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            **{optimizer: True},
        )
        self.number = 0
        self.encoded = self._encode(self.whole)

    def flows(self) -> None:
        for part in self.parts:
            part.total(part.losses(self.network, self.encoded, self._random())).backward()

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> dict[str, float]:
        losses: dict[str, Tensor] = {}
        shared = self._encode(self.whole) if self.encode_once else None
        for part in self.parts:
            found = part.losses(self.network, shared or self._encode(part), self._random())
            part.total(found).backward()
            losses |= {name: loss.detach() for name, loss in found.items()}
        nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.trained], 1 - EMA_DECAY)
        self.number += 1
        return {name: float(loss) for name, loss in losses.items()}

    def _encode(self, part: Objective) -> Encoded:
        return part.encode(part.prepare(self.samples), self.config.stage.phases[0].resolution, self._random())

    def _random(self) -> StepRandom:
        return step_random(self.config, self.number)


class Ours(Contestant):
    """A step of the trainer itself.

    Args:
        folder: of its run.
        settings: of the run, beside those of the work.

    Raises:
        ConfigError: the configuration refuses a setting.
    """

    def __init__(self, work: Work, folder: Path, settings: Sequence[str]) -> None:
        self.config, raw_config = work.config([*settings, f"runs_dir={folder}"])
        Path(self.config.run_dir).mkdir(parents=True, exist_ok=True)
        self.trainer = build_trainer(self.config, raw_config, Start(), RankInfo(0, 0, 1, CPU))
        self.trainer.objective.frozen.load_state_dict(work.frozen.state_dict())
        self.parameters = sum(parameter.numel() for parameter in self.trainer.engine.module.parameters())
        self.samples = work.samples
        prepared = self.trainer.objective.prepare(self.samples)
        self.encoded = self.trainer.objective.encode(prepared, self.config.stage.phases[0].resolution, self._random())

    def flows(self) -> None:
        objective, engine = self.trainer.objective, self.trainer.engine
        engine.backward(objective.total(objective.losses(engine, self.encoded, self._random())), last=True)

    def discard(self) -> None:
        self.trainer.engine.step(0.0)

    def step(self) -> dict[str, float]:
        samples = self.trainer.objective.prepare(self.samples)
        batch = Batch(samples, torch.arange(self.config.stage.global_batch_size))
        losses = self.trainer.step(batch, self.config.stage.phases[0], StepClock(CPU)).losses
        return {name: float(loss) for name, loss in losses.items()}

    def close(self) -> None:
        self.trainer.close()

    def _random(self) -> StepRandom:
        return step_random(self.config, self.trainer.state.phase_step)


def step_random(config: TrainConfig, number: int) -> StepRandom:
    """The random numbers of a step of the first phase, counted from 0, as the trainer draws them."""
    batch = config.stage.global_batch_size
    return StepRandom(f"{config.seed}/{config.stage.name}/0", number, batch, slice(0, batch), CPU)


def largest_difference(work: Work) -> float:
    """Between the outputs of diffusers' U-Nets and of our diffuser, over all flows, with no layer silent."""
    config, _ = work.config()
    diffuser = starting_diffuser(config, Start(), CPU)
    generator = torch.Generator().manual_seed(0)
    for parameter in diffuser.parameters():
        # Last layers start at zero, and would hide all that is before them.
        if not parameter.any():
            parameter.data.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    unets = Unets(diffuser, config.model)
    whole = Objective(stage_flows(config), Schedule(config.model.schedule), work.frozen, config.objective)
    random = step_random(config, 0)
    encoded = whole.encode(whole.prepare(work.samples), config.stage.phases[0].resolution, random)
    difference = 0.0

    def compare(inputs: Sequence[DiffuserInput]) -> list[Tensor]:
        nonlocal difference
        ours, theirs = diffuser(inputs), unets(inputs)
        for own, their in zip(ours, theirs, strict=True):
            difference = max(difference, float((own - their).abs().max() / own.std()))
        return ours

    with torch.no_grad():
        for flow in stage_flows(config):
            part = Objective([flow], whole.schedule, work.frozen, config.objective)
            part.losses(compare, encoded, random)
    return difference
