"""img2dataset's command line and environment for one part."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

import data_pipeline
from data_pipeline.download.fetch import Limits
from data_pipeline.download.plan import Part
from vdtrain import redaction
from vdtrain.config.data_schema import DownloadConfig

OPT_OUTS = ("noai", "noimageai", "noindex", "noimageindex", "noml")
IMAGE_TIMEOUTS = 3  # total time of an image, in units of data.download.timeout
# Not `-m`: workers unpickle classes by module name, and `__main__` differs between them.
RUN = "from data_pipeline.download.img2dataset_run import main; main()"


def img2dataset_command(part: Part, config: DownloadConfig, allow_loopback: bool, modules: Path) -> list[str]:
    """The command line that downloads the missing shards of a part.

    Args:
        modules: made by `own_modules`.
    """
    limits = Limits(
        timeout=config.timeout,
        seconds=IMAGE_TIMEOUTS * config.timeout,
        max_bytes=config.max_bytes,
        retries=config.retries,
        allow_loopback=allow_loopback,
        user_agent=config.user_agent,
        opt_outs=OPT_OUTS,
    )
    options = {
        "url_list": str(part.urls),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": [name for name in pq.read_schema(part.urls).names if name not in ("url", "caption")],
        "output_format": "webdataset",
        "output_folder": str(part.folder),
        "distributor": config.distributor,
        "processes_count": config.processes,
        "thread_count": config.threads,
        "number_sample_per_shard": config.samples_per_shard,
        "oom_shard_count": 6,
        "image_size": config.image_size,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "encode_quality": config.encode_quality,
        "min_image_size": config.min_image_size,
        "max_aspect_ratio": config.max_aspect_ratio,
        "timeout": config.timeout,
        "disallowed_header_directives": list(OPT_OUTS),
    }
    document = {
        "img2dataset": options,
        "limits": asdict(limits),
        "cluster": config.cluster,
        "environment": img2dataset_environment(config, modules),
    }
    return [config.python or sys.executable, "-c", RUN, json.dumps(document)]


@contextmanager
def own_modules(part: Part, config: DownloadConfig) -> Iterator[Path]:
    """A new folder with what img2dataset's processes import of this project, which only this user can write.

    Another interpreter must not import this one's other packages. Python runs a sitecustomize.py of every folder that
    it imports from, so the folder cannot be one that others write. Other machines share only the disk of the shards.
    """
    shared = None if config.cluster is None else part.folder.parent.resolve()
    with tempfile.TemporaryDirectory(prefix=".vdtrain-modules-", dir=shared) as folder:
        modules = Path(folder)
        (modules / "data_pipeline").symlink_to(Path(data_pipeline.__file__).resolve().parent)
        (modules / "vdtrain").mkdir()
        (modules / "vdtrain" / "redaction.py").symlink_to(Path(redaction.__file__).resolve())
        yield modules


def img2dataset_environment(config: DownloadConfig, modules: Path) -> dict[str, str]:
    """Environment of img2dataset's processes, on all machines; `modules` as for `img2dataset_command`."""
    python = config.python or sys.executable
    return {
        "PYTHONPATH": str(modules),
        "PYTHONSAFEPATH": "1",
        "PYSPARK_PYTHON": python,
        "PYSPARK_DRIVER_PYTHON": python,
        "NO_ALBUMENTATIONS_UPDATE": "1",  # it queries the package index at every import
        "RAY_USAGE_STATS_ENABLED": "0",  # it reports usage to its makers
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(config.max_image_pixels),  # refuses a decompression bomb before decoding it
        "OMP_NUM_THREADS": "1",
    }
