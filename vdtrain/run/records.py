"""What a run folder's records tell about checkpoints that can no longer be found.

Checkpoints are often on another disk, behind a link that may be unmounted. Needs no PyTorch.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path

from vdtrain.checkpoint.folder import CHECKPOINTS, LATEST_FILE, latest_name
from vdtrain.config.foreign import read_yaml
from vdtrain.files import atomic_write, read_record
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


def lost_checkpoints(run_dir: Path, every_steps: int, damage: str = "") -> str | None:
    """A line on why a run folder without a whole checkpoint must not start from scratch; None if the folder is new.

    Args:
        every_steps: `checkpoint.every_steps`, if the folder does not record its own.
        damage: of the checkpoints that are there, if there are any.
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
    folder = run_dir / CHECKPOINTS
    unmounted = folder.is_symlink() and not folder.exists()
    if step == 0 and not unmounted and not damage:
        return None
    told = f"{record} tells of checkpoints up to step {step}, and " if step else ""
    what = "holds no whole checkpoint" if not step else "holds no whole one"
    if unmounted:
        what = f"is a link to {os.readlink(folder)}, which is not there"
    elif not folder.exists():
        what = "is not there"
    elif damage:
        what += f" ({damage})"
    return (
        f"run_dir={run_dir}: {told}{folder} {what}; mount or bring back what was there, or begin anew: give another "
        f"run_dir, or remove {run_dir}"
    )


def _saved(run_dir: Path) -> int:
    try:
        return int(json.loads(read_record(run_dir / SAVED_FILE))["step"])
    except OSError as error:
        # A link to itself leads to no folder.
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return 0
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        # It was written once; the step does not matter.
        return 1


def _latest(run_dir: Path) -> int:
    try:
        return int(latest_name(run_dir / CHECKPOINTS).removeprefix("step-"))
    except (OSError, ValueError):
        return 0


def _trained_past_a_save(run_dir: Path, every_steps: int) -> int:
    """The last step in the figures, if a checkpoint before it must have been written; else 0.

    For runs of versions without other records: a save has ended, or was counted as failed, when the next begins.
    """
    record = next(iter(last_metrics(run_dir, 1)), {})
    with suppress(OSError, ValueError, KeyError, TypeError):
        every_steps = int(read_yaml(run_dir / CONFIG_FILE)["checkpoint"]["every_steps"])
    step = int(record.get("step", 0))
    begun = (step - 1) // every_steps
    return step if begun - int(record.get("failed_saves", 0)) > 1 else 0
