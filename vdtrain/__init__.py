"""Training system for Versatile Diffusion: one diffusion model for text and images, trained flow by flow.

Start at `cli.py` for the commands, `pipeline.py` for a trained model in Python, `training/trainer.py` for training.
"""

from typing import TYPE_CHECKING

__version__: str

# Behind this test, so that a type checker still reports names that the package does not have.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> str:
        """`__version__`, read from the installed package when it is asked for: most commands never need it."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("vdtrain")
        except PackageNotFoundError:  # it runs from a checkout that is not installed
            return "unknown"
