"""img2dataset with our own fetching (`fetch.py`), in the interpreter and on the engine of the download's settings.

`main` runs in its own process. The workers of multiprocessing, Spark and Ray import this module when they unpickle the
downloader. It needs img2dataset and the chosen engine, and no other dependency of the project.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

# webdataset, which writes the tars, imports PyTorch if it is installed, which costs every worker seconds and memory.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]

import img2dataset.downloader  # noqa: E402

from data_pipeline.download.fetch import Limits, fetch_row  # noqa: E402
from vdtrain.redaction import redact_output  # noqa: E402

PIXELS = "OPENCV_IO_MAX_IMAGE_PIXELS"
WORKER_KILLED = 71
OBJECT_STORE_BYTES = 100 << 20  # no image passes through it


class GuardedDownloader(img2dataset.downloader.Downloader):  # type: ignore[misc]
    """img2dataset's downloader with our fetching; it carries the limits to every worker."""

    def __init__(self, *, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self.limits = limits

    def download_shard(self, row: tuple[int, str]) -> None:
        if PIXELS not in os.environ:
            raise RuntimeError(f"{PIXELS} is not set in this worker: decompression bombs would be decoded")
        img2dataset.downloader.download_image_with_retry = lambda row, **_: fetch_row(row, self.limits)
        super().download_shard(row)


class NoLogger:
    """Replaces the process that prints img2dataset's statistics: the download reads them itself."""

    def __init__(self, *_: Any) -> None:
        pass

    start = join = terminate = __init__


def main() -> None:
    """Run img2dataset with the settings in the only argument, a JSON document."""
    redact_output()
    document = json.loads(sys.argv[1])
    options, limits = document["img2dataset"], document["limits"]
    if not hasattr(img2dataset.downloader, "download_image_with_retry"):
        raise RuntimeError("this img2dataset has no download_image_with_retry, which must be replaced; use 1.47")
    # The package has a function of the same name, which hides the module.
    module = importlib.import_module("img2dataset.main")
    module.__dict__["Downloader"] = partial(GuardedDownloader, limits=Limits(**limits))
    module.__dict__["LoggerProcess"] = NoLogger
    engine = {"multiprocessing": _processes, "pyspark": _spark, "ray": _ray}[options["distributor"]]
    with engine(options["processes_count"], document["cluster"], document["environment"]):
        module.download(**options)


@contextmanager
def _processes(processes: int, cluster: str | None, environment: Mapping[str, str]) -> Iterator[None]:
    """End if a worker is killed, usually out of memory: the pool would hang."""

    def watch() -> None:
        seen = set()
        while True:
            time.sleep(0.5)
            seen.update(multiprocessing.active_children())
            for worker in seen:
                # The pool itself ends its workers with SIGTERM (15).
                if worker.exitcode is not None and worker.exitcode < 0 and worker.exitcode != -15:
                    print(f"a worker was ended by signal {-worker.exitcode} (9: memory?)", flush=True)
                    os._exit(WORKER_KILLED)

    threading.Thread(target=watch, daemon=True).start()
    yield


@contextmanager
def _spark(processes: int, cluster: str | None, environment: Mapping[str, str]) -> Iterator[None]:
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName("vdtrain download").config("spark.ui.enabled", "false")
    if cluster is None:
        builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
    for name, value in environment.items():
        builder = builder.config(f"spark.executorEnv.{name}", value)
    # img2dataset uses the active session; its own asks for 16 GB.
    session = builder.master(cluster or f"local[{processes}]").getOrCreate()
    try:
        yield
    finally:
        session.stop()


@contextmanager
def _ray(processes: int, cluster: str | None, environment: Mapping[str, str]) -> Iterator[None]:
    import ray

    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        if cluster is None:
            # Without it Ray writes a token into the home folder.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init(
                address="local",
                num_cpus=processes,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=folder,
            )
        else:
            ray.init(address=cluster, runtime_env={"env_vars": dict(environment)})
        try:
            yield
        finally:
            ray.shutdown()


if __name__ == "__main__":
    sys.exit("start it by `from data_pipeline.download.img2dataset_run import main`: workers find classes by that name")
