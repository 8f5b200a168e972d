"""What a run folder's records tell about checkpoints that can no longer be found.

Checkpoints are often on another disk, behind a link that may be unmounted. Needs no PyTorch.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vdtrain.checkpoint.folder import CHECKPOINTS, LATEST_FILE, latest_by_sizes
from vdtrain.files import atomic_write
from vdtrain.run.restarts import RECORD_FILE, read_events
from vdtrain.run.summary import CONFIG_FILE
from vdtrain.run.tracking import METRICS_FILE, last_metrics

SAVED_FILE = "saved.json"


def note_saved(run_dir: Path, step: int) -> None:
    """Record in the run folder that its newest checkpoint is that of `step`.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_write(run_dir / SAVED_FILE) as draft:
        draft.write_text(json.dumps({"step": step}) + "\n")


def lost_checkpoints(run_dir: Path, every_steps: int) -> str | None:
    """A line on why a run folder without a whole checkpoint must not start from scratch; None if the folder is new.

    Args:
        every_steps: `checkpoint.every_steps`, if the folder does not record its own.
    """
    found = max(
        (
            (_saved(run_dir), SAVED_FILE),
            (max((event.step for event in read_events(run_dir)), default=0), RECORD_FILE),
            (_trained_past_a_save(run_dir, every_steps), METRICS_FILE),
            (_latest(run_dir), f"{CHECKPOINTS}/{LATEST_FILE}"),
        )
    )
    step, record = found
    if step == 0:
        return None
    folder = run_dir / CHECKPOINTS
    what = "holds no whole one"
    if folder.is_symlink() and not folder.exists():
        what = f"is a link to {os.readlink(folder)}, which is not there"
    elif not folder.exists():
        what = "is not there"
    elif damages := latest_by_sizes(folder)[1]:
        what += f" ({damages[0]})"
    return (
        f"run_dir={run_dir}: {record} tells of checkpoints up to step {step}, and {folder} {what}; mount or bring back "
        f"what was there, or remove {run_dir} to begin anew"
    )


def _saved(run_dir: Path) -> int:
    try:
        return int(json.loads((run_dir / SAVED_FILE).read_text(encoding="utf-8"))["step"])
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        # A link to itself leads to no folder.
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return 0
        # It was written once; the step does not matter.
        return 1


def _latest(run_dir: Path) -> int:
    try:
        return int((run_dir / CHECKPOINTS / LATEST_FILE).read_text(encoding="utf-8").strip().removeprefix("step-"))
    except (OSError, ValueError):
        return 0


def _trained_past_a_save(run_dir: Path, every_steps: int) -> int:
    """The last step in the figures, if a checkpoint before it must have been written; else 0.

    For runs of versions without other records: a save has ended, or was counted as failed, when the next begins.
    """
    record = next(iter(last_metrics(run_dir, 1)), {})
    try:
        raw_config = OmegaConf.load(run_dir / CONFIG_FILE)
        every_steps = int(OmegaConf.select(raw_config, "checkpoint.every_steps") or every_steps)
    except (OSError, ValueError, OmegaConfBaseException):
        pass
    step = int(record.get("step", 0))
    begun = (step - 1) // every_steps
    return step if begun - int(record.get("failed_saves", 0)) > 1 else 0
