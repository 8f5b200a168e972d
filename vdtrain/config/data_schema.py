"""The schema of `conf/data/`: where a set comes from, what is kept of it, and how it is downloaded and streamed."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from vdtrain.config.overrides import FilePath, PartArguments


@dataclass
class SourceConfig:
    """One published metadata set and the tar shards made of it."""

    schema: str = MISSING  # laion2b_en, coyo700m or table
    metadata: FilePath = MISSING  # a parquet file, or a folder of them, whose columns may differ
    selected: FilePath = (
        MISSING  # folder of the rows that `select` kept, in parquet parts, with selection.json written last
    )
    shards: FilePath = MISSING  # folder of the tar shards that `download` made of them


@dataclass
class FilterConfig:
    """What a row must be like to be kept. A limit that is null is none; values at a limit are kept."""

    side_min: int | None = MISSING  # shortest side in pixels, by the metadata
    area_min: int | None = MISSING  # pixels
    aspect_ratio_min: float | None = MISSING  # width over height
    aspect_ratio_max: float | None = MISSING
    similarity_min: float | None = MISSING  # of image and caption: CLIP ViT-B/32 cosine
    nsfw_max: float | None = MISSING  # probability
    nsfw_labels: list[str] = MISSING  # labels that are dropped, where a set has labels
    watermark_max: float | None = MISSING  # probability
    aesthetic_min: float | None = MISSING  # LAION's predictor, 0 to 10
    unscored: str = MISSING  # keep or drop: rows without the value that a filter asks for
    caption_characters_min: int | None = MISSING  # of the cleaned caption, as the following two
    caption_characters_max: int | None = MISSING
    caption_words_min: int | None = MISSING
    duplicate_urls: str = MISSING  # keep or drop; of several rows the first stays
    duplicate_images: str = MISSING  # keep or drop: rows of one perceptual hash, where a set has hashes


@dataclass
class BlockListConfig:
    """Files that name what must not be downloaded: text with one entry a line, or parquet with one column."""

    url: list[FilePath] = MISSING
    hash: list[FilePath] = MISSING  # LAION's hash of URL and caption
    md5: list[FilePath] = MISSING  # of the image's file, where a set has it
    phash: list[FilePath] = MISSING  # perceptual, where a set has it: of COYO-700M the column image_phash


@dataclass
class SelectConfig:
    """Which rows of the metadata are worth their download."""

    processes: int = MISSING
    rows_per_part: int = MISSING  # a multiple of download.samples_per_shard
    scratch: FilePath = MISSING  # folder for what an interrupted run goes on from; removed at the end
    filters: FilterConfig = field(default_factory=FilterConfig)
    block_lists: BlockListConfig = field(default_factory=BlockListConfig)


@dataclass
class DownloadConfig:
    """Arguments of img2dataset and the limits that it is kept within."""

    distributor: str = MISSING  # multiprocessing, pyspark or ray
    cluster: str | None = None  # address of a Spark master or a Ray cluster; null is this machine
    python: FilePath | None = None  # interpreter of the environment that img2dataset is in; null is this one
    processes: int = MISSING
    threads: int = MISSING  # per process
    parts: list[int] | None = None  # numbers of the parts to download; null is all
    task: int = 0  # of several tasks that share the parts, as in a Slurm array, this one
    tasks: int = 1
    samples_per_shard: int = MISSING
    image_size: int = MISSING  # shortest side in pixels
    encode_quality: int = MISSING
    min_image_size: int = MISSING
    max_aspect_ratio: float = MISSING
    max_image_pixels: int = MISSING
    max_bytes: int = MISSING  # of an image as it is served
    timeout: int = MISSING  # seconds without a byte; an image may take three times as long in all
    retries: int = MISSING  # at once, after failures that may pass
    user_agent: str = MISSING
    min_success_share: float = MISSING  # a part with fewer images is stopped
    retry_below: float = MISSING  # share of images that are fetched, or failed for good, below which a shard is low
    retry_rounds: int = MISSING  # how often low shards are downloaded again


@dataclass
class IndexConfig:
    """How shards are checked before they are listed in the manifest."""

    processes: int = MISSING
    decode: bool = MISSING  # every image, which finds damage behind its header and takes some times as long


@dataclass
class InspectConfig:
    """What is looked at of a manifest."""

    shards: int = MISSING  # drawn at random, for what is not told by the list of shards: captions, aspect ratios
    images: int = MISSING  # on the contact sheet, drawn at random
    pixels: int = MISSING  # side of each
    seed: int = MISSING
    output: FilePath | None = MISSING  # the contact sheet; inspect.png beside the manifest by default


@dataclass
class LatentCacheConfig:
    """Image latents that are encoded once and kept, for `data.latents=cached`."""

    folder: FilePath = MISSING
    resolutions: list[int] = MISSING  # that `python -m data_pipeline latents` encodes
    batch_size: int = MISSING  # images that go through the encoder together


@dataclass
class ShapesConfig:
    """The drawn image set of the demo."""

    folder: FilePath = MISSING
    images: int = MISSING
    pixels: int = MISSING
    seed: int = MISSING
    port: int = MISSING


@dataclass
class DataConfig:
    """One data set, from its metadata to the stream of batches."""

    name: str = MISSING
    root: FilePath = MISSING
    sources: dict[str, SourceConfig] = MISSING
    manifest: FilePath = MISSING
    # Let in addresses of this machine itself, which the URL policy refuses otherwise: for the demo's own server.
    allow_loopback: bool = MISSING
    # What yields the batches (vdtrain.data.batch.BatchStream), a `_target_` with its arguments.
    stream: PartArguments = field(default_factory=lambda: {"_target_": "vdtrain.data.stream.PairStream"})
    # inline encodes every image as it comes; cached takes its latent's moments from `latent_cache`.
    latents: str = MISSING
    select: SelectConfig = MISSING
    download: DownloadConfig = MISSING
    index: IndexConfig = MISSING
    inspect: InspectConfig = MISSING
    latent_cache: LatentCacheConfig = MISSING
    shapes: ShapesConfig | None = None
