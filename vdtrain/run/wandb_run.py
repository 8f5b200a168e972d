"""A run on Weights & Biases across all its starts. Any failure prints one line, and training continues.

W&B drops records whose step is not above its own counter. A resumed run repeats steps, so W&B counts records itself.
"step" is an ordinary metric that serves as the axis of all others.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import textwrap
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vdtrain.config.schema import TrackingConfig
from vdtrain.extras import missing
from vdtrain.files import atomic_write

PROBE_SECONDS = 8.0
OUT_OF_ORDER = (500, 502, 503, 504)
# All processes wait for the one that opens the run, so an outage may delay them only this long.
INIT_SECONDS = 20.0
# A scheduler that has asked a job to stop does not wait for uploads.
FINISH_SECONDS = 20.0
# For the end of W&B's own process.
END_SECONDS = 5.0
REASON_LENGTH = 300


class WandbError(RuntimeError):
    """W&B did not accept a run; the message gives the reason in one line."""


def open_run(tracking: TrackingConfig, seconds: float = INIT_SECONDS, **arguments: Any) -> Any:
    """Open a run with the wandb package, without any prompt at a terminal.

    Args:
        tracking: its mode is "online" or "offline".
        seconds: time limit for W&B's server.
        arguments: of `wandb.init`.

    Raises:
        WandbError: the run could not be opened.
    """
    if (line := missing("wandb")) is not None:
        raise WandbError(line)
    try:
        import wandb

        # Failures of W&B's own telemetry do not matter here.
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
    # The package may be broken, its process may fail, its server may answer anything.
    except Exception as error:
        raise WandbError(reason(error)) from error


def end_wandb() -> None:
    """End W&B's own process. It waits for its server; this process waits END_SECONDS at most."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is None:
        return

    def end() -> None:
        # It may be gone already, killed with the job.
        with contextlib.suppress(Exception):
            wandb.teardown()

    thread = threading.Thread(target=end, name="wandb-end", daemon=True)
    thread.start()
    thread.join(END_SECONDS)


def wandb_problem(tracking: TrackingConfig) -> str | None:
    """A line on why a run cannot be tracked; None if it can or needs no network. Takes at most 20 seconds."""
    if tracking.mode == "disabled":
        return None
    setting = f"tracking.mode={tracking.mode}"
    if (line := missing("wandb")) is not None:
        return f"{setting}: {line}, or choose tracking=none"
    if tracking.mode != "online":
        return None
    remedy = "choose tracking=offline, and send the run later by `wandb sync`"
    try:
        import wandb

        wandb.setup(_settings(tracking))
        address = wandb.setup().settings.base_url
    except Exception as error:
        return f"{setting}: {reason(error)}; repair the settings of wandb, or choose tracking=none"
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
    """An error of the wandb package in one line, without its advice on its own settings."""
    text = " ".join(str(error).partition("Consider increasing")[0].split())
    return textwrap.shorten(text or type(error).__name__, REASON_LENGTH, placeholder=" ...")


def _settings(tracking: TrackingConfig) -> Any:
    """Process-wide settings; the configured mode overrides the environment's."""
    import wandb

    return wandb.Settings(silent=True, mode=tracking.mode)  # type: ignore[arg-type]


def _no_key(address: str) -> str:
    return f"no API key for {address} here; run `wandb login` or set WANDB_API_KEY"


def _unreachable(address: str) -> str | None:
    """Why a server does not answer, or answers that it is out of order; None if it works."""
    try:
        with urllib.request.urlopen(address, timeout=PROBE_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP status {error.code}" if error.code in OUT_OF_ORDER else None
    except OSError as error:
        return " ".join(str(getattr(error, "reason", error)).split())


WANDB_ID_FILE = "wandb_id"
WANDB_URL_FILE = "wandb_url"
WANDB_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# W&B's answer if the run was deleted on its web page; the id can then never be used again.
DELETED = re.compile(r"previously created and deleted", re.IGNORECASE)

Warn = Callable[[str], None]
Record = Mapping[str, Any]


class WandbRun:
    """Sends records to W&B. After a failure it warns once and sends nothing more.

    Args:
        run: of the wandb package; None if W&B did not accept it.
        file: holds all figures, whatever W&B received.
    """

    def __init__(self, run: Any, file: Path, warn: Warn) -> None:
        self._run, self._file, self._warn = run, file, warn

    def send(self, records: Sequence[Record]) -> None:
        """Send records, oldest first."""
        for record in records:
            if self._run is None:
                return
            try:
                self._run.log(_flat(record))
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        """End the run; records that are not sent yet get FINISH_SECONDS."""
        if self._run is None:
            end_wandb()
            return
        folder = self._run.settings.sync_dir
        try:
            self._run.finish()
        except TimeoutError:
            self._warn(
                f"W&B did not take the last figures within {FINISH_SECONDS:.0f} s; they are in {self._file}, and "
                f"`wandb sync {folder}` sends them"
            )
        except Exception as error:
            self._give_up(error)
        self._run = None
        end_wandb()

    def _give_up(self, error: Exception) -> None:
        """Stop sending. A SIGTERM to a whole job ends W&B's process while the run still saves."""
        self._run = None
        # W&B would otherwise try again, and print so, when this process ends.
        end_wandb()
        self._warn(f"W&B takes no more of this run ({reason(error)}); its figures are in {self._file}")


def start_run(
    run_dir: Path,
    file: Path,
    tracking: TrackingConfig,
    run_config: Mapping[str, Any],
    records: Sequence[Record],
    warn: Warn,
    seconds: float,
) -> WandbRun:
    """Open a run folder's run on W&B, or a new one; warn in one line if W&B does not accept it.

    Args:
        file: holds all figures.
        records: of the run so far; those that W&B lacks are sent.
        seconds: time limit for W&B.
    """
    try:
        run, new = _open(run_dir, tracking, run_config, warn, seconds)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        newest = -1 if new else _newest_step(run, tracking)
        if run.url and tracking.mode == "online":
            _write(run_dir / WANDB_URL_FILE, run.url + "\n")
    except Exception as error:
        warn(
            f"tracking.mode={tracking.mode}: W&B does not take this run ({reason(error)}); its figures go to {file}, "
            "and the next start tries again"
        )
        return WandbRun(None, file, warn)
    opened = WandbRun(run, file, warn)
    if newest is not None:
        opened.send([record for record in records if record["step"] > newest])
    return opened


def _newest_step(run: Any, tracking: TrackingConfig) -> float | None:
    """The step of W&B's newest record; None offline, where it is unknown until the folders are sent."""
    newest = run.summary.get("step")
    known = newest if isinstance(newest, int | float) else -1
    return known if tracking.mode == "online" else None


def _open(
    run_dir: Path, tracking: TrackingConfig, run_config: Mapping[str, Any], warn: Warn, seconds: float
) -> tuple[Any, bool]:
    """The run of the wandb package, and whether it is new."""

    def opened(number: str) -> Any:
        return open_run(
            tracking,
            seconds,
            dir=str(run_dir),
            id=number,
            name=run_dir.name,
            resume="allow" if tracking.mode == "online" else None,
            config=dict(run_config),
        )

    path = run_dir / WANDB_ID_FILE
    number, new = _run_id(path, warn)
    try:
        return opened(number), new
    except WandbError as error:
        if not DELETED.search(str(error)):
            raise
    fresh = _new_id(path)
    warn(f"W&B: run {number} was deleted there, and W&B takes no id twice; it goes on as {fresh}, with all its figures")
    return opened(fresh), True


def _run_id(path: Path, warn: Warn) -> tuple[str, bool]:
    """The run folder's W&B id, written if it is new, and whether it is new.

    Raises:
        OSError: it cannot be read or written.
    """
    if not path.exists():
        return _new_id(path), True
    text = path.read_text(errors="replace").strip()
    if WANDB_ID.fullmatch(text):
        return text, False
    fresh = _new_id(path)
    warn(f"{path}: held no id of a W&B run; the run goes on there as {fresh}, with all its figures")
    return fresh, True


def _new_id(path: Path) -> str:
    number = uuid.uuid4().hex[:8]
    _write(path, number)
    return number


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as draft:
        draft.write_text(text)


def _flat(record: Record) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            # The singular, so that groups appear below "learning_rate".
            flat |= {f"{key.removesuffix('s') if key != 'loss' else key}/{name}": each for name, each in value.items()}
        elif key != "time":
            flat[key] = value
    # Records sent later keep their time.
    return flat | ({"_timestamp": record["time"]} if "time" in record else {})
