"""A run on Weights & Biases across all its starts. Any failure prints one line, and training continues.

W&B drops records whose step is not above its own counter. A resumed run repeats steps, so W&B counts records itself.
"samples" is an ordinary metric that serves as the axis of all others.
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
from vdtrain.errors import missing
from vdtrain.files import atomic_write
from vdtrain.redaction import redacted, redacted_arguments
from vdtrain.tracking.metrics import INIT_SECONDS, Line, flat

PROBE_SECONDS = 8.0
OUT_OF_ORDER = (500, 502, 503, 504)
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
        seconds: time limit for W&B's server.
        arguments: of `wandb.init`, where the settings name nothing else.

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
        settings = wandb.Settings(
            silent=True,
            console="off",
            # The address of a remote may have a password, and changes that are not committed may too.
            disable_git=True,
            init_timeout=seconds,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        named = {name: getattr(tracking, name) for name in ("name", "group", "tags", "notes", "job_type")}
        arguments |= {name: value for name, value in redacted(named).items() if value}
        mode: Any = tracking.mode
        with redacted_arguments():
            return wandb.init(
                project=tracking.project, entity=tracking.entity, mode=mode, settings=settings, **arguments
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
WANDB_GROUP_FILE = "wandb_group"
# The step of the newest line that W&B had when a start ended in order.
WANDB_SENT_FILE = "wandb_sent"
# The offline folder of a start that has not ended in order, and the beginning of its name from then on.
WANDB_OPEN_FILE, CUT_SHORT = "wandb_open", "cut-short-"
# Metrics whose summary in the table of runs is more than their last value.
SUMMARIES = {
    "loss/*": "min,last",
    "gradient_norm": "max,last",
    "pairs_per_second": "mean,last",
    "tflops": "mean,last",
    "data_wait": "mean,max,last",
    "memory_gb": "max",
    "save_time/*": "mean,max,last",
}
WANDB_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# W&B's answer if the run was deleted on its web page; the id can then never be used again.
DELETED = re.compile(r"previously created and deleted", re.IGNORECASE)

Warn = Callable[[str], None]


class WandbRun:
    """See tracking.Sink. The run folder's run on W&B, or a new one.

    Args:
        file: in the run folder; holds all figures, whatever W&B received.
        lines: of the run so far; those that W&B lacks are sent.
        seconds: time limit for W&B to open the run.
        init_from: the run that this one starts from; both are in one group.
    """

    def __init__(
        self,
        file: Path,
        tracking: TrackingConfig,
        run_config: Mapping[str, Any],
        lines: Sequence[Line],
        warn: Warn,
        seconds: float,
        init_from: str | None,
    ) -> None:
        self._run_dir, self._file, self._tracking, self._warn = file.parent, file, tracking, warn
        self._run: Any = None
        self._newest: int | None = None
        try:
            if tracking.mode == "offline":
                _set_aside(self._run_dir)
            run, new = self._open(run_config, seconds, init_from)
            run.define_metric("samples")
            run.define_metric("*", step_metric="samples")
            for name, summary in SUMMARIES.items():
                run.define_metric(name, step_metric="samples", summary=summary)
            newest = -1 if new else self._newest_step(run)
            if run.url and tracking.mode == "online":
                _write(self._run_dir / WANDB_URL_FILE, run.url + "\n")
            if tracking.mode == "offline":
                _write(self._run_dir / WANDB_OPEN_FILE, Path(run.settings.sync_dir).name)
        except Exception as error:
            warn(
                f"tracking.mode={tracking.mode}: W&B does not take this run ({reason(error)}); its figures go to "
                f"{file}, and the next start tries again"
            )
            return
        self._run = run
        self.send([line for line in lines if line["step"] > newest])

    @property
    def accepted(self) -> bool:
        """Whether W&B takes this run."""
        return self._run is not None

    def _open(self, run_config: Mapping[str, Any], seconds: float, init_from: str | None) -> tuple[Any, bool]:
        """The run of the wandb package, and whether it is new."""

        def opened(number: str) -> Any:
            return open_run(
                self._tracking,
                seconds,
                dir=str(self._run_dir),
                id=number,
                name=self._run_dir.name,
                group=_group(self._run_dir, self._tracking, number, init_from),
                job_type="train",
                resume="allow" if self._tracking.mode == "online" else None,
                config=dict(run_config),
            )

        path = self._run_dir / WANDB_ID_FILE
        number, new = _run_id(path, self._warn)
        try:
            return opened(number), new
        except WandbError as error:
            if not DELETED.search(str(error)):
                raise
        fresh = _new_id(path)
        as_new = f"it goes on as {fresh}, with all its figures"
        self._warn(f"W&B: run {number} was deleted there, and W&B takes no id twice; {as_new}")
        return opened(fresh), True

    def _newest_step(self, run: Any) -> float:
        """The step of W&B's newest line; offline, of those before the last end in order. -1 if it is not known."""
        newest = run.summary.get("step")
        if self._tracking.mode == "offline":
            with contextlib.suppress(OSError, ValueError):
                newest = int((self._run_dir / WANDB_SENT_FILE).read_text())
        return newest if isinstance(newest, int | float) else -1

    def send(self, lines: Sequence[Line]) -> None:
        """Send lines, oldest first."""
        for line in lines:
            if self._run is None:
                return
            try:
                self._run.log(self._content(line))
                self._newest = line["step"]
            except Exception as error:
                self._give_up(error)

    def alert(self, title: str, text: str, line: Line) -> None:
        """Send an alert; W&B may mail it."""
        if self._run is None:
            return
        try:
            self._run.alert(title, text, level="WARN")
        except Exception as error:
            self._give_up(error)

    def _content(self, line: Line) -> dict[str, Any]:
        # Lines sent later keep their time.
        content: dict[str, Any] = flat(line) | ({"_timestamp": line["time"]} if "time" in line else {})
        path = self._run_dir / line.get("path", "")
        if "image" in line and path.is_file():
            import wandb

            content[line["image"]] = wandb.Image(str(path))
        return content

    def close(self) -> None:
        """End the run; records that are not sent yet get FINISH_SECONDS."""
        if self._run is None:
            end_wandb()
            return
        folder = self._run.settings.sync_dir
        try:
            self._run.finish()
            if self._newest is not None:
                _write(self._run_dir / WANDB_SENT_FILE, f"{self._newest}\n")
            (self._run_dir / WANDB_OPEN_FILE).unlink(missing_ok=True)
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


def _set_aside(run_dir: Path) -> None:
    """Rename the offline folder of a start that was killed: `wandb sync` would stop at it.

    Its lines are sent again. W&B's process keeps the newest ones in memory, and they are lost if it is killed, too.
    """
    try:
        name = (run_dir / WANDB_OPEN_FILE).read_text().strip()
    except (OSError, ValueError):
        return
    folder = run_dir / "wandb" / name
    if name.startswith("offline-run-") and folder.is_dir():
        folder.rename(folder.with_name(CUT_SHORT + name))


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


def _group(run_dir: Path, tracking: TrackingConfig, number: str, init_from: str | None) -> str:
    """The group of a run: that of the run that it starts from, so that a curriculum is one group."""
    own = run_dir / WANDB_GROUP_FILE
    # The run folder of a checkpoint is two folders above it.
    before = [] if init_from is None else [Path(init_from), *Path(init_from).parents[:2]]
    found = [folder / WANDB_GROUP_FILE for folder in (run_dir, *before)]
    kept = next((path.read_text(errors="replace").strip() for path in found if path.is_file()), "")
    group = tracking.group or kept or f"{run_dir.absolute().parent.name}-{number}"
    if not own.is_file() or own.read_text(errors="replace") != group:
        _write(own, group)
    return group


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as draft:
        draft.write_text(text)
