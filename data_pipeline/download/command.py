"""img2dataset's command line and environment for one part."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from data_pipeline.download.fetch import Limits
from data_pipeline.download.plan import Part
from vdtrain.config.data_schema import DownloadConfig

OPT_OUTS = ("noai", "noimageai", "noindex", "noimageindex", "noml")
IMAGE_TIMEOUTS = 3  # total time of an image, in units of data.download.timeout
# Not `-m`: workers unpickle classes by module name, and `__main__` differs between them.
RUN = "from data_pipeline.download.img2dataset_run import main; main()"


def img2dataset_command(part: Part, config: DownloadConfig, allow_loopback: bool) -> list[str]:
    """The command line that downloads the missing shards of a part."""
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
        "environment": img2dataset_environment(part, config),
    }
    return [config.python or sys.executable, "-c", RUN, json.dumps(document)]


def img2dataset_environment(part: Part, config: DownloadConfig) -> dict[str, str]:
    """Environment of img2dataset's processes, on all machines."""
    modules = part.folder.parent / ".modules"
    package = modules / "data_pipeline"
    # A folder that holds this package alone: another interpreter must not import this one's other packages.
    modules.mkdir(exist_ok=True)
    here = Path(__file__).resolve().parent.parent
    if not (package.is_symlink() and package.resolve() == here):
        draft = modules / f"{socket.gethostname()}.{os.getpid()}"
        draft.symlink_to(here)
        draft.replace(package)
    python = config.python or sys.executable
    return {
        "PYTHONPATH": str(modules.resolve()),
        "PYTHONSAFEPATH": "1",
        "PYSPARK_PYTHON": python,
        "PYSPARK_DRIVER_PYTHON": python,
        "NO_ALBUMENTATIONS_UPDATE": "1",  # it queries the package index at every import
        "RAY_USAGE_STATS_ENABLED": "0",  # it reports usage to its makers
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(config.max_image_pixels),  # refuses a decompression bomb before decoding it
        "OMP_NUM_THREADS": "1",
    }
