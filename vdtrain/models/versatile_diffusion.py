"""The frozen parts of a whole model, built from its configuration."""

from __future__ import annotations

from vdtrain.config import ModelConfig
from vdtrain.instantiate import instantiate
from vdtrain.models.frozen import FrozenParts
from vdtrain.models.frozen_weights import shared_loading


def build_frozen(config: ModelConfig) -> FrozenParts:
    """VAE and context encoder of every modality, with their weights, in float32 on the CPU.

    Raises:
        ConfigError: a `_target_` or an argument that does not exist.
    """
    with shared_loading():
        return FrozenParts(
            {
                name: (
                    instantiate(modality.vae, f"model.modalities.{name}.vae"),
                    instantiate(modality.context_encoder, f"model.modalities.{name}.context_encoder"),
                )
                for name, modality in config.modalities.items()
            }
        )
