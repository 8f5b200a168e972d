"""Whether Weights & Biases can be reached, and takes this machine's credentials."""

from __future__ import annotations

import urllib.error
import urllib.request

from vdtrain.config import TrackingConfig

PROBE_SECONDS = 8.0


def wandb_problem(tracking: TrackingConfig) -> str | None:
    """A line on why a run could not be tracked; None if it can be, or needs no network. Takes 20 seconds at most."""
    if tracking.mode != "online":
        return None
    import wandb

    setting = f"tracking.mode={tracking.mode}"
    remedy = "choose tracking=offline, and send the run later by `wandb sync`"
    wandb.setup(wandb.Settings(silent=True))
    try:
        address = wandb.setup().settings.base_url
        if not wandb.login(prompt=False, verify=True):
            return f"{setting}: no API key for {address} here; run `wandb login` or set WANDB_API_KEY, or {remedy}"
    except Exception as error:
        reason = _unreachable(address)
        if reason is not None:
            return f"{setting}: {address} cannot be reached ({reason}); {remedy}"
        text = " ".join(str(error).split())
        return f"{setting}: {text}; run `wandb login --relogin` or set WANDB_API_KEY, or {remedy}"
    finally:
        wandb.teardown()
    return None


def _unreachable(address: str) -> str | None:
    """Why a server gives no answer at all; None if it does."""
    try:
        with urllib.request.urlopen(address, timeout=PROBE_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return " ".join(str(getattr(error, "reason", error)).split())
