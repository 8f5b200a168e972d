"""A small diffuser and diffusers' U-Nets of the same sizes, for comparisons with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import DualTransformer2DModel
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel
from torch import Tensor, nn

from vdtrain.config.schema import DiffuserConfig, ModalityConfig, ModelConfig
from vdtrain.flows import active_groups, all_flows
from vdtrain.models.diffuser import Diffuser
from vdtrain.models.layer_plan import make_plan
from vdtrain.weights.published.diffusers_names import Kind, UnetNames

MODALITIES = ["image", "text"]
KINDS: dict[str, Kind] = {"image": "image", "text": "flat"}
CONTEXT_WIDTH, TEXT_WIDTH, HEADS, NORM_GROUPS = 24, 48, 4, 8
CHANNELS, BLOCKS = [32, 64, 64], 2
# The last level has no attention, as at full size.
ATTENTION_LEVELS = [0, 1]
NETWORK_TOLERANCE, LAYER_TOLERANCE = 1e-4, 1e-5


def model_config() -> ModelConfig:
    context = {"_target_": "vdtrain.models.context_layers.ContextLayers", "context_width": CONTEXT_WIDTH}
    image = {"_target_": "vdtrain.models.image_layers.ImageDataLayers", "latent_channels": 4}
    text = {"_target_": "vdtrain.models.text_layers.TextDataLayers", "latent_width": TEXT_WIDTH, "tokens": 4}
    return ModelConfig(
        name="small",
        base_weights=None,
        diffuser=DiffuserConfig(
            channels=CHANNELS,
            blocks_per_level=BLOCKS,
            attention_levels=ATTENTION_LEVELS,
            heads=HEADS,
            norm_groups=NORM_GROUPS,
        ),
        modalities={
            "image": ModalityConfig(data_layers=image, context_layers=context),
            "text": ModalityConfig(data_layers=text, context_layers=context),
        },
    )


def make_diffuser() -> Diffuser:
    """All four flows, no branch silent."""
    return randomise(Diffuser(model_config(), active_groups(all_flows(MODALITIES)))).eval()


def unet_arguments(modality: str) -> dict[str, Any]:
    """What diffusers' U-Net of a modality takes for the sizes of `model_config`."""
    suffix = {"image": "2D", "text": "Flat"}[modality]
    attends = [level in ATTENTION_LEVELS for level in range(len(CHANNELS))]
    latent = {"image": 4, "text": [TEXT_WIDTH, 1, 1]}[modality]
    return {
        "in_channels": latent,
        "out_channels": latent,
        "block_out_channels": CHANNELS,
        "layers_per_block": BLOCKS,
        "norm_num_groups": NORM_GROUPS,
        # The number of heads, in spite of its name.
        "attention_head_dim": HEADS,
        "cross_attention_dim": CONTEXT_WIDTH,
        "down_block_types": [f"{'CrossAttn' * attend}DownBlock{suffix}" for attend in attends],
        "up_block_types": [f"{'CrossAttn' * attend}UpBlock{suffix}" for attend in reversed(attends)],
    }


def make_unet(modality: str) -> nn.Module:
    """diffusers' U-Net of a modality, its own initial weights."""
    unet: Any = {"image": UNet2DConditionModel, "text": UNetFlatConditionModel}[modality]
    made: nn.Module = unet(**unet_arguments(modality)).eval()
    return made


def unet_names(data: str, context: str) -> UnetNames:
    return UnetNames(make_plan(model_config().diffuser), KINDS[data], data, context)


def unet_state(diffuser: Diffuser, data: str, context: str) -> dict[str, Tensor]:
    """The diffuser's tensors under a U-Net's keys."""
    names = unet_names(data, context)
    state = {names.to_diffusers(name): tensor for name, tensor in diffuser.state_dict().items()}
    return {key: tensor for key, tensor in state.items() if key is not None}


def randomise(module: nn.Module, seed: int = 0) -> Any:
    """Random parameters of a size that keeps the signal's, so that every layer counts in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(drawn * 0.1 + float(name.endswith("weight")))
    return module


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Same shape, and nowhere further apart than an absolute tolerance; neither may be silent."""
    assert found.shape == expected.shape
    assert float(expected.std()) > 0.1
    difference = float((found - expected).abs().max())
    assert difference <= tolerance, f"largest difference {difference:.2e}"


def accept_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers' dual-guided network run: 0.42 gives its own module a mask, always None, that it does not take."""
    mix = DualTransformer2DModel.forward

    def forward(self: DualTransformer2DModel, *inputs: Any, encoder_attention_mask: None = None, **more: Any) -> Any:
        return mix(self, *inputs, **more)

    monkeypatch.setattr(DualTransformer2DModel, "forward", forward)
