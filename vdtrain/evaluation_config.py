"""The schema of `conf/evaluate.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from vdtrain.config import SamplerConfig, TrackingConfig
from vdtrain.data_config import DataConfig
from vdtrain.setting_types import FilePath


@dataclass
class FidConfig:
    """Fréchet Inception distance."""

    weights: FilePath | None = MISSING  # of the Inception network of 2015; null leaves FID out
    # Mean and covariance of the real pictures, an npz file: read where it is, else written there; null for neither.
    reference: FilePath | None = MISSING


@dataclass
class ClipConfig:
    """The CLIP that scores. Where `architecture` is null, it is the one that the checkpoint's contexts come from."""

    architecture: Any = MISSING  # name of an open_clip model, or what its files hold
    weights: FilePath | None = MISSING
    tokenizer: FilePath | None = MISSING  # null is CLIP's own


@dataclass
class EvaluateConfig(SamplerConfig):
    """Root of `conf/evaluate.yaml`."""

    flows: list[str] = MISSING
    samples: int = MISSING  # pairs of the manifest, each giving every flow one sample
    part_samples: int = MISSING  # pairs whose results are one file: what an interruption costs
    loader_workers: int = MISSING
    fid: FidConfig = MISSING
    clip: ClipConfig = MISSING
    data: DataConfig = MISSING
    tracking: TrackingConfig = MISSING
