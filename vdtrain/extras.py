"""The optional extras of the package, and the command that installs the one that is missing."""

from __future__ import annotations

from importlib.util import find_spec

# Package -> the extra that has it (pyproject.toml).
EXTRAS = {
    "fastapi": "app",
    "gcsfs": "stores",
    "gradio": "app",
    "img2dataset": "data",
    "matplotlib": "evaluation",
    "nltk": "evaluation",
    "pillow_heif": "data",
    "pyspark": "distributed",
    "ray": "distributed",
    "s3fs": "stores",
    "sacrebleu": "evaluation",
    "scipy": "evaluation",
    "tensorboardX": "tracking",
    "uvicorn": "app",
    "wandb": "tracking",
    "webdataset": "data",
    "xformers": "xformers",
}


def install(*packages: str) -> str:
    """The command that installs the extras of `packages`, marked as a command of a message."""
    extras = ",".join(sorted({EXTRAS[package] for package in packages}))
    return f"`pip install 'vdtrain[{extras}]'`"


def missing(package: str) -> str | None:
    """A line that names the extra of a package; None if the package is installed. Imports nothing."""
    return None if find_spec(package) else f"{package} is not installed; run {install(package)}"
