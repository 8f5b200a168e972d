"""The way to Weights & Biases: whether it can be reached with this machine's credentials, and a run opened there."""

from __future__ import annotations

import contextlib
import logging
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from typing import Any

from vdtrain.config import TrackingConfig

PROBE_SECONDS = 8.0
OUT_OF_ORDER = (500, 502, 503, 504)
# All processes wait for the one that opens the run: an outage may hold them this long, and no longer.
INIT_SECONDS = 20.0
# A scheduler that has asked a job to stop does not wait for uploads.
FINISH_SECONDS = 20.0
# For the end of its own process, which only has to go.
END_SECONDS = 5.0
REASON_LENGTH = 300


class WandbError(RuntimeError):
    """W&B does not take a run. The message is a line on why."""


def open_run(tracking: TrackingConfig, seconds: float = INIT_SECONDS, **arguments: Any) -> Any:
    """A run of the wandb package, which is never asked of a person at a terminal.

    Args:
        tracking: its mode is "online" or "offline".
        seconds: how long W&B's server may take.
        arguments: of `wandb.init`.

    Raises:
        WandbError: for whatever reason there is none.
    """
    try:
        import wandb

        # What its own telemetry cannot send is no one's trouble here.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        wandb.setup(_settings(tracking))
        if tracking.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise WandbError(_no_key(wandb.setup().settings.base_url))
        return wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            mode=tracking.mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=seconds,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
            **arguments,
        )
    except WandbError:
        raise
    # Its package may be missing or broken, its process may not start, its server may answer anything.
    except Exception as error:
        raise WandbError(reason(error)) from error


def end_wandb() -> None:
    """End W&B's own process, which waits for its server where it can; this process does not, when it ends."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is None:
        return

    def end() -> None:
        # It may be gone already, killed with all processes of a job.
        with contextlib.suppress(Exception):
            wandb.teardown()

    thread = threading.Thread(target=end, name="wandb-end", daemon=True)
    thread.start()
    thread.join(END_SECONDS)


def wandb_problem(tracking: TrackingConfig) -> str | None:
    """A line on why a run could not be tracked; None if it can be, or needs no network. Takes 20 seconds at most."""
    if tracking.mode != "online":
        return None
    setting = f"tracking.mode={tracking.mode}"
    remedy = "choose tracking=offline, and send the run later by `wandb sync`"
    try:
        import wandb

        wandb.setup(_settings(tracking))
        address = wandb.setup().settings.base_url
    except Exception as error:
        return f"{setting}: {reason(error)}; install wandb or repair its settings, or choose tracking=none"
    try:
        if not wandb.login(prompt=False, verify=True):
            return f"{setting}: {_no_key(address)}, or {remedy}"
    except Exception as error:
        unreachable = _unreachable(address)
        if unreachable is not None:
            return f"{setting}: {address} cannot be reached ({unreachable}); {remedy}"
        return f"{setting}: {reason(error)}; run `wandb login --relogin` or set WANDB_API_KEY, or {remedy}"
    finally:
        end_wandb()
    return None


def reason(error: Exception) -> str:
    """An error of the wandb package as a line, without its advice on its own settings."""
    text = " ".join(str(error).partition("Consider increasing")[0].split())
    return textwrap.shorten(text or type(error).__name__, REASON_LENGTH, placeholder=" ...")


def _settings(tracking: TrackingConfig) -> Any:
    """Of the whole process; the mode that was asked for stands above that of the environment."""
    import wandb

    return wandb.Settings(silent=True, mode=tracking.mode)  # type: ignore[arg-type]


def _no_key(address: str) -> str:
    return f"no API key for {address} here; run `wandb login` or set WANDB_API_KEY"


def _unreachable(address: str) -> str | None:
    """Why a server gives no answer, or none but that it is out of order; None if it does."""
    try:
        with urllib.request.urlopen(address, timeout=PROBE_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP status {error.code}" if error.code in OUT_OF_ORDER else None
    except OSError as error:
        return " ".join(str(getattr(error, "reason", error)).split())
