"""A trained model ready to sample.

model = VersatileDiffusion.from_checkpoint("runs/stage3_four_flow")
pictures = model.generate("text-to-image", ["a red circle on a white background"], resolution=64)
captions = model.generate("image-to-text", pictures)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdtrain.compose import ConfigError
from vdtrain.config import ModelConfig
from vdtrain.diffusion.sampling import Progress, ddim, guided
from vdtrain.diffusion.schedule import Schedule
from vdtrain.flows import Flow
from vdtrain.models.diffuser import Context, Diffuser, layer_group
from vdtrain.models.versatile_diffusion import build_frozen
from vdtrain.training.checkpoints import read_weights
from vdtrain.training.curriculum import model_config, resolve_checkpoint
from vdtrain.validation import check_resolution


class VersatileDiffusion:
    """Diffuser, frozen parts and noise schedule, on one device.

    Args:
        config: of the whole model; names the frozen parts' weights.
        diffuser: with at least the layers of the flows that will be asked for.
    """

    def __init__(self, config: ModelConfig, diffuser: Diffuser, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.diffuser = diffuser.to(self.device).eval().requires_grad_(False)
        self.frozen = build_frozen(config).to(self.device)
        self.schedule = Schedule(config.schedule, self.device)

    @classmethod
    def from_checkpoint(cls, path: str, weights: str = "ema", device: str = "cpu") -> VersatileDiffusion:
        """Load a run folder's latest checkpoint, or a checkpoint folder.

        Args:
            weights: "ema" (averaged) or "model" (as trained).

        Raises:
            ConfigError: there is no complete checkpoint.
        """
        checkpoint = resolve_checkpoint("checkpoint", path)
        config = model_config(checkpoint)
        tensors = read_weights(checkpoint, weights)
        diffuser = Diffuser(config, {layer_group(name) for name in tensors})
        diffuser.load_state_dict(tensors)
        return cls(config, diffuser, device)

    def generate(
        self,
        flow: str,
        inputs: Any,
        *,
        resolution: int = 512,
        steps: int = 50,
        guidance_scale: float = 7.5,
        seed: int = 0,
        progress: Progress = list,
    ) -> Any:
        """One sample per input: uint8 [B, 3, R, R] pictures or a list of captions, by the flow's output.

        The starting noise of a sample depends on the seed and on its place in `inputs` alone.

        Args:
            flow: "text-to-image", "image-to-image", "image-to-text" or "text-to-text".
            inputs: captions, or uint8 [B, 3, H, W] pictures, by the flow's context.
            resolution: side of generated pictures in pixels.
            guidance_scale: strength of classifier-free guidance; 1 is none.

        Raises:
            ConfigError: the model was not trained for the flow, or cannot make pictures of that resolution.
        """
        check_resolution("resolution", resolution, self.config)
        way = self._flow(flow)
        if isinstance(inputs, Tensor):
            inputs = inputs.to(self.device)
        count = len(inputs)
        tokens = self.frozen.encode({way.context: inputs}, (), (way.context,)).contexts[way.context]
        unconditional = self.frozen.unconditional(way.context, count)
        shape = self.frozen.latent_shape(way.output, resolution)
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed + index)) for index in range(count)]
        ).to(self.device)
        predict = guided(self.diffuser, way.output, Context(way.context, tokens), unconditional, guidance_scale)
        latents = ddim(predict, noise, self.schedule, steps, progress=progress)
        return self.frozen.decode(way.output, latents, torch.Generator().manual_seed(seed))

    def _flow(self, name: str) -> Flow:
        try:
            flow = Flow.parse(name)
        except ValueError as error:
            raise ConfigError(f"flow={name}: {error}") from error
        for part, layers in ((flow.output, self.diffuser.data_layers), (flow.context, self.diffuser.context_layers)):
            if part not in layers:
                raise ConfigError(f"flow={name}: this checkpoint has no layers for {part!r}; sample from a later stage")
        return flow
