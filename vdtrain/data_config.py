"""The schema of `conf/data/`: where a data set comes from, what is kept of it, and how it is downloaded and streamed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class SourceConfig:
    """One published metadata set and the tar shards made of it."""

    schema: str = MISSING  # laion2b_en, coyo700m or table
    metadata: str = MISSING  # a parquet file, or a folder of them
    selected: str = MISSING  # folder of the rows that `select` kept
    shards: str = MISSING  # folder of the tar shards that `download` made of them


@dataclass
class SelectConfig:
    """Which rows of the metadata are worth their download."""

    processes: int = MISSING
    rows_per_part: int = MISSING  # a multiple of download.samples_per_shard


@dataclass
class DownloadConfig:
    """Arguments of img2dataset and the limits that it is kept within."""

    distributor: str = MISSING
    processes: int = MISSING
    threads: int = MISSING
    samples_per_shard: int = MISSING
    image_size: int = MISSING  # shortest side in pixels
    encode_quality: int = MISSING
    min_image_size: int = MISSING
    max_aspect_ratio: float = MISSING
    max_image_pixels: int = MISSING
    timeout: int = MISSING  # seconds per picture
    retries: int = MISSING


@dataclass
class ShapesConfig:
    """The drawn picture set of the demo."""

    folder: str = MISSING
    pictures: int = MISSING
    pixels: int = MISSING
    seed: int = MISSING
    port: int = MISSING


@dataclass
class DataConfig:
    """One data set, from its metadata to the stream of batches."""

    name: str = MISSING
    root: str = MISSING
    sources: dict[str, SourceConfig] = MISSING
    manifest: str = MISSING
    # Let in addresses of this machine itself, which the URL policy refuses otherwise: for the demo's own server.
    allow_loopback: bool = MISSING
    # What yields the batches (vdtrain.data.stream.BatchStream), a `_target_` with its arguments.
    stream: dict[str, Any] = field(default_factory=lambda: {"_target_": "vdtrain.data.stream.PairStream"})
    select: SelectConfig = MISSING
    download: DownloadConfig = MISSING
    shapes: ShapesConfig | None = None
