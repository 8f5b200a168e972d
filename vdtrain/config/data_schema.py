"""The schema of `conf/data/`: sources of a data set, what is kept of them, and how it is downloaded and streamed."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from vdtrain.config.fields import FilePath, PartArguments, setting

KEEP_OR_DROP = ("keep", "drop")
# Settings that only the preparation of data reads, not training.
PREPARATION = tuple(
    f"data.{part}"
    for part in ("sources", "shards", "allow_loopback", "select", "download", "pack", "index", "inspect", "shapes")
)


@dataclass
class SourceConfig:
    """One published metadata set and the tar shards made of it."""

    schema: str = setting("layout of the metadata", choices=("laion2b_en", "coyo700m", "datacomp", "table"))
    metadata: FilePath = setting("a parquet file, or a folder of them with its subfolders; their columns may differ")
    selected: FilePath = setting("folder of the rows that select keeps, as parquet files")
    shards: FilePath = setting("folder of the tar shards that download writes")
    columns: dict[str, str | None] = setting(
        "names of the metadata's columns, where the schema does not find them: {caption: my_text}; null leaves one out",
        factory=dict,
    )


@dataclass
class FilterConfig:
    """The filters that a row must pass. null disables a limit; limits are inclusive."""

    side_min: int | None = setting("shortest side in pixels, by the metadata; null for no limit", least=0)
    area_min: int | None = setting("pixels; null for no limit", least=0)
    aspect_ratio_min: float | None = setting("width over height; null for no limit", least=0)
    aspect_ratio_max: float | None = setting("width over height; null for no limit", least=0)
    similarity_min: float | None = setting(
        "CLIP ViT-B/32 cosine of image and caption; null for no limit", least=-1, most=1
    )
    nsfw_max: float | None = setting("NSFW probability; null for no limit", least=0, most=1)
    nsfw_labels: list[str] = setting("NSFW labels to drop, in sets that have labels")
    watermark_max: float | None = setting("watermark probability; null for no limit", least=0, most=1)
    aesthetic_min: float | None = setting("score of LAION's aesthetic predictor; null for no limit", least=0, most=10)
    unscored: str = setting("rows without the value that a filter asks for", choices=KEEP_OR_DROP)
    caption_characters_min: int | None = setting("characters of the cleaned caption; null for no limit", least=0)
    caption_characters_max: int | None = setting("characters of the cleaned caption; null for no limit", least=1)
    caption_words_min: int | None = setting("words of the cleaned caption; null for no limit", least=0)
    duplicate_urls: str = setting("rows with the URL of an earlier row", choices=KEEP_OR_DROP)
    duplicate_images: str = setting(
        "rows with the perceptual hash of an earlier row, in sets that have hashes", choices=KEEP_OR_DROP
    )


@dataclass
class BlockListConfig:
    """Files that name what must not be downloaded: text with one entry a line, or parquet with one column."""

    url: list[FilePath] = setting("files of URLs, or folders of them: text with one a line, or parquet with one column")
    hash: list[FilePath] = setting("files of LAION's hash of URL and caption")
    md5: list[FilePath] = setting("files of the MD5 of the image file, for sets that have it")
    phash: list[FilePath] = setting("files of perceptual hashes, for sets that have them (COYO-700M: image_phash)")


@dataclass
class SelectConfig:
    """Which rows of the metadata are worth their download."""

    processes: int = setting("processes that read metadata", least=1)
    rows_per_part: int = setting("rows of a part, a multiple of download.samples_per_shard", least=1)
    scratch: FilePath = setting("folder of intermediate files, which are removed at the end")
    filters: FilterConfig = field(default_factory=FilterConfig)
    block_lists: BlockListConfig = field(default_factory=BlockListConfig)


@dataclass
class DownloadConfig:
    """Arguments of img2dataset, and its limits."""

    distributor: str = setting("how img2dataset spreads its work", choices=("multiprocessing", "pyspark", "ray"))
    cluster: str | None = setting("address of a Spark master or a Ray cluster; null for this machine", None)
    python: FilePath | None = setting("Python interpreter with img2dataset; null for this one", None)
    processes: int = setting("downloading processes", least=1)
    threads: int = setting("threads of each process", least=1)
    parts: list[int] | None = setting("numbers of the parts to download; null for all", None, least=0)
    task: int = setting("number of this task, of several tasks that share the parts, as in a Slurm array", 0, least=0)
    tasks: int = setting("number of tasks that share the parts", 1, least=1)
    samples_per_shard: int = setting("rows that one shard is made of", least=1)
    image_size: int = setting("pixels of the shortest side after resizing", least=1)
    encode_quality: int = setting("JPEG quality", least=1, most=100)
    min_image_size: int = setting("shortest side in pixels; a smaller image is dropped", least=0)
    max_aspect_ratio: float = setting("longest over shortest side; an image above it is dropped", above=0)
    max_image_pixels: int = setting("pixels; a larger image is not decoded", least=1)
    max_bytes: int = setting("bytes of an image file; the download of a larger one stops", least=1)
    timeout: int = setting("seconds without a byte (a whole image may take three times as long)", least=1)
    retries: int = setting("immediate further attempts after a temporary failure", least=0)
    user_agent: str = setting("User-Agent header of the requests")
    min_success_share: float = setting("share of images; a part below it is stopped", least=0, most=1)
    retry_below: float = setting(
        "share of images downloaded or permanently failed; a shard below it is downloaded again", least=0, most=1
    )
    retry_rounds: int = setting("how often such shards are downloaded again", least=0)


@dataclass
class PackConfig:
    """How a user's own images and captions become shards."""

    input: FilePath | None = setting(
        "folder of images; table of image paths and captions (csv, tsv, jsonl, json, parquet); or COCO captions file",
        None,
    )
    output: FilePath = setting("folder of the shards", "${data.root}/packed")
    images: FilePath | None = setting(
        "folder that the paths of a table are relative to; null for the table's own, and where COCO has its images",
        None,
    )
    image_column: str | None = setting("column of image paths; null for the first with a usual name", None)
    caption_column: str | None = setting("column of captions; null for the first with a usual name", None)
    table: str | None = setting("table of the captions within the folder of the images; null for none", None)
    captions: str = setting(
        "which captions of an image with several: the first, or each in a sample of its own",
        "first",
        choices=("first", "each"),
    )
    processes: int = setting("processes that read and resize images", 16, least=1)
    samples_per_shard: int = setting("images that one shard is made of", 1000, least=1)
    image_size: int = setting(
        "pixels of the shortest side after resizing; smaller images are not enlarged", 512, least=1
    )
    encode_quality: int = setting("JPEG quality", 90, least=1, most=100)
    min_image_size: int = setting("shortest side in pixels; a smaller image is left out", 256, least=0)
    max_image_pixels: int = setting("pixels; a larger image is not decoded", 100_000_000, least=1, most=178_000_000)
    overwrite: bool = setting("replace shards of other images or settings", False)
    index: bool = setting("index the shards when they are made, as the only ones", False)


@dataclass
class IndexConfig:
    """How shards are checked before the manifest lists them."""

    processes: int = setting("processes that read shards", least=1)
    decode: bool = setting("decode every image: finds damage behind its header, and takes several times as long")
    caption: str | None = setting(
        "field of each sample's JSON that holds the caption, such as title or meta.title; null for the sample's .txt, "
        "or else the field caption or text",
        None,
    )
    drop_repeated: int | None = setting(
        "how often one and the same image may come before all of its samples are left out; null for any number",
        None,
        least=1,
    )
    members: dict[str, list[str]] = setting(
        "by modality beside images and captions, the endings of its files in the tars: {audio: [wav, flac]}; two of an "
        "image, a caption and such files make a sample",
        factory=dict,
    )


@dataclass
class InspectConfig:
    """What is reported of a manifest."""

    shards: int = setting("shards drawn at random for the figures of captions and aspect ratios", least=1)
    images: int = setting("images on the contact sheet, drawn at random; 0 for no sheet", least=0)
    pixels: int = setting("side of each image on the contact sheet", least=32)
    seed: int = setting("seed of the random draws", least=0)
    output: FilePath | None = setting("file of the contact sheet; null for inspect.png beside the manifest")
    overwrite: bool = setting("replace an existing file", False)


@dataclass
class LatentCacheConfig:
    """Image latents that are encoded once and kept, for `data.latents=cached`."""

    folder: FilePath = setting("folder of the cached latents")
    resolutions: list[int] = setting("resolutions that latents encodes")
    batch_size: int = setting("images that go through the encoder together", least=1)


@dataclass
class ShapesConfig:
    """The drawn image set of the demo."""

    folder: FilePath = setting("folder of the images and their metadata")
    images: int = setting("number of images", least=1)
    pixels: int = setting("side of each image", least=1)
    seed: int = setting("seed of the drawings", least=0)
    port: int = setting("port that serve listens on", least=0, most=65535)


@dataclass
class SplitConfig:
    """The pairs that are held out of training."""

    share: float | None = setting(
        "share of the pairs, chosen by a hash of each pair's name, that is never trained on; null holds none out, and "
        "lets evaluate take those that the checkpoint's run held out of the same data",
        None,
        least=0,
        below=1,
    )


@dataclass
class DataConfig:
    """One data set, from its metadata to the stream of batches."""

    name: str = setting("name of the data set")
    root: FilePath = setting("folder that the other folders are in by default")
    sources: dict[str, SourceConfig] = MISSING
    shards: list[FilePath] = setting(
        "folders of tars, or tars, that another program made: index lists them as the source named own", factory=list
    )
    manifest: FilePath = setting("folder of the manifest, the list of all shards and samples")
    references: FilePath | None = setting(
        "all captions of each image, for the figures of captions: COCO's captions_*.json, or what pack writes; null "
        "for those in the manifest",
        None,
    )
    urls: list[str] = setting(
        "addresses of tars for data.stream=webdataset, such as s3://bucket/{00000..00999}.tar", factory=list
    )
    allow_loopback: bool = setting("download from addresses of this machine too, for the server of the demo")
    stream: PartArguments = setting(
        "class that yields the batches, with its arguments",
        factory=lambda: {"_target_": "vdtrain.data.stream.PairStream"},
    )
    latents: str = setting("encode images in training, or read the cached latents", choices=("inline", "cached"))
    validation: SplitConfig = field(default_factory=SplitConfig)
    flip: bool = setting(
        "mirror an image with a chance of one half, but not one whose caption names left or right", False
    )
    select: SelectConfig = MISSING
    download: DownloadConfig = MISSING
    pack: PackConfig = field(default_factory=PackConfig)
    index: IndexConfig = MISSING
    inspect: InspectConfig = MISSING
    latent_cache: LatentCacheConfig = MISSING
    shapes: ShapesConfig | None = None
