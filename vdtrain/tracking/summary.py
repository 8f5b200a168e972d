"""The progress of a run, read from its folder, and the command that follows it. Needs no PyTorch.

The records also tell of checkpoints that can no longer be found. Checkpoints are often on another disk, behind a link
that may be unmounted.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vdtrain.checkpoint.folder import CHECKPOINTS, LATEST_FILE, CheckpointSummary, latest_by_sizes, latest_name
from vdtrain.config.command_line import plain_path, shell
from vdtrain.config.compose import config_folder, options
from vdtrain.config.instantiate import own_modules, read_yaml, recorded
from vdtrain.config.overrides import word_for
from vdtrain.config.schema import StageConfig, TrackingConfig, TrainConfig
from vdtrain.config.validation import phase_steps
from vdtrain.files import atomic_write, read_record
from vdtrain.redaction import redacted
from vdtrain.run.processes import started_by_command
from vdtrain.run.restarts import RECORD_FILE, START, Event, read_events
from vdtrain.tracking.metrics import METRICS_FILE, last_metrics
from vdtrain.tracking.wandb_run import WANDB_URL_FILE

# Settings that define a stage.
OWN_SETTINGS = ("stage", "stage.name", "stage.flows", "stage.gradient_scales", "stage.init_from", "run_dir")
SCRIPTS = "slurm"


def next_stage(stage: str) -> str | None:
    """The stage whose file starts from the run of `stage`; None after the last stage."""
    for name in options("stage"):
        loaded = OmegaConf.to_container(OmegaConf.load(config_folder() / "stage" / f"{name}.yaml"), resolve=False)
        if isinstance(loaded, dict) and loaded.get("init_from") == f"${{runs_dir}}/{stage}":
            return name
    return None


def next_command(config: TrainConfig, overrides: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """The command after a complete stage, quoted for a shell. After the last stage it is a sampling command.

    It keeps the user's overrides, except those that define the stage, and the launcher: sbatch, torchrun or none.
    """
    name = next_stage(config.stage.name)
    if name is None:
        return shell(_last(config))
    return shell([*_launcher(name, environment), *_overrides(config, name, overrides, environment)])


def _last(config: TrainConfig) -> list[str]:
    flow = next((flow for flow in config.stage.flows if flow.startswith("text-to-")), None)
    if flow is None:
        return ["vdtrain", "status", plain_path(config.run_dir)]
    settings = [f"flow={flow}", f"resolution={config.stage.phases[-1].resolution}", f"device={config.hardware.device}"]
    if modules := own_modules(config.model):
        settings.append(f"trust=[{','.join(modules)}]")
    return ["vdtrain", "sample", plain_path(config.run_dir), "a red circle", *settings]


def _overrides(config: TrainConfig, name: str, given: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    # The batch script names the stage itself.
    words = [] if _script(name, environment) else [f"stage={name}"]
    for override in given:
        key = override.partition("=")[0].lstrip("+~")
        if key not in OWN_SETTINGS and not key.startswith("stage.gradient_scales."):
            words.append(override)
    run_dir = Path(config.run_dir)
    if run_dir != Path(config.runs_dir) / config.stage.name:
        # A sibling whose name has the next stage in place of this one.
        stage = config.stage.name
        following = run_dir.with_name(run_dir.name.replace(stage, name) if stage in run_dir.name else name)
        words += [word_for("stage.init_from", str(run_dir)), word_for("run_dir", str(following))]
    return words


def _launcher(name: str, environment: Mapping[str, str]) -> list[str]:
    script = _script(name, environment)
    if script is not None:
        flags = {"partition": "PARTITION", "account": "ACCOUNT"}
        given = {flag: environment.get(f"SLURM_JOB_{variable}") for flag, variable in flags.items()}
        return ["sbatch", *(f"--{flag}={value}" for flag, value in given.items() if value), str(script)]
    if "TORCHELASTIC_RUN_ID" not in environment or started_by_command(environment):
        return ["srun"] * ("SLURM_JOB_ID" in environment) + ["vdtrain", "train"]
    processes, nodes = (environment.get(key, "1") for key in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    meeting = ["--standalone"]
    if nodes != "1":
        meeting = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={environment.get('MASTER_ADDR')}"]
    return ["torchrun", *meeting, f"--nproc-per-node={processes}", "-m", "vdtrain", "train"]


def _script(name: str, environment: Mapping[str, str]) -> Path | None:
    """The batch script of a stage, in the folder where the running job was submitted."""
    script = Path(SCRIPTS) / f"{name}.sh"
    submitted = Path(environment.get("SLURM_SUBMIT_DIR", "."))
    return script if "SLURM_JOB_ID" in environment and (submitted / script).is_file() else None


CONFIG_FILE = "config.yaml"
# The pace is that of the newest log lines, within one phase.
PACE_LINES = 10


@dataclass(frozen=True)
class RunSummary:
    """One stage's run.

    Attributes:
        phase: the newest log line's phase, from 1 to `phases`.
        step, samples: of the newest log line, or of the checkpoint if that is newer.
        pairs_per_second: over the newest log lines of the phase; None before the first one.
        larger_phases: whether phases with larger images, and so another pace, follow.
        record: the newest log line, as the trainer wrote it; empty before the first one.
        last_log_time: when it was written, in seconds since 1970; None before the first one.
        checkpoint: the newest one whose files have their sizes.
        damages: one line per newer, damaged checkpoint.
        starts: of the trainer, oldest first; empty in folders of earlier versions.
        tracked: the run's address on W&B, or how to send it there; None if it is not tracked.
        dumps: files in which processes recorded an error since the last start.
    """

    folder: Path
    stage: str
    phase: int
    phases: int
    resolution: int
    step: int
    total_steps: int
    samples: int
    total_samples: int
    pairs_per_second: float | None
    larger_phases: bool
    checkpoint: CheckpointSummary | None
    last_log_time: float | None
    record: dict[str, Any] = field(default_factory=dict)
    damages: list[str] = field(default_factory=list)
    starts: list[Event] = field(default_factory=list)
    tracked: str | None = None
    dumps: list[Path] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the stage's last checkpoint exists."""
        return self.checkpoint is not None and 0 < self.total_steps <= self.checkpoint.step

    @property
    def seconds_left(self) -> float | None:
        """At the present pace; None if that is unknown."""
        if self.complete or not self.pairs_per_second:
            return 0.0 if self.complete else None
        return (self.total_samples - self.samples) / self.pairs_per_second

    @property
    def restarts(self) -> int:
        return max(0, len(self.starts) - 1)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder."""
    return any((folder / name).exists() for name in (METRICS_FILE, RECORD_FILE, CHECKPOINTS))


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run folder, else the run folders in it, by name."""
    if is_run(folder):
        return [folder]
    return sorted(each for each in folder.iterdir() if each.is_dir() and is_run(each)) if folder.is_dir() else []


def summarise(folder: Path) -> RunSummary:
    """Read a run's files; missing or unreadable files count as not written yet."""
    stage, tracking = _settings(folder)
    steps = [phase_steps(TrainConfig(stage=stage), phase) for phase in stage.phases] if stage is not None else []
    records = last_metrics(folder, PACE_LINES)
    record = records[-1] if records else {}
    starts = [event for event in read_events(folder) if event.kind == START]
    checkpoint, damages = latest_by_sizes(folder / CHECKPOINTS)
    known = [record.get("step", 0), 0 if checkpoint is None else checkpoint.step]
    step = max(known) if records or checkpoint is not None else starts[-1].step if starts else 0
    batch = stage.global_batch_size if stage is not None else 0
    if record:
        batch = record.get("samples", 0) // max(1, record["step"])
    total = sum(steps) or (starts[-1].total_steps if starts else record.get("total_samples", 0) // max(1, batch))
    phase = next((number for number in range(len(steps)) if step < sum(steps[: number + 1])), max(0, len(steps) - 1))
    resolutions = [each.resolution for each in stage.phases] if stage is not None else [record.get("resolution", 0)]
    since = starts[-1].time if starts else 0.0
    return RunSummary(
        folder=folder,
        stage=folder.name if stage is None else stage.name,
        phase=phase + 1,
        phases=len(resolutions),
        resolution=resolutions[phase],
        step=step,
        total_steps=total,
        samples=step * batch,
        total_samples=total * batch,
        pairs_per_second=pace(records),
        larger_phases=any(each > resolutions[phase] for each in resolutions[phase + 1 :]),
        checkpoint=checkpoint,
        last_log_time=_spoke(folder, record),
        record=record,
        damages=damages,
        starts=starts,
        tracked=tracked_at(folder, tracking),
        dumps=sorted(path for path in (folder / "dumps").glob("rank-*.txt") if path.stat().st_mtime >= since),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in a run folder, without credentials; empty if there is none that can be read."""
    try:
        loaded = redacted(read_yaml(folder / CONFIG_FILE))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _settings(folder: Path) -> tuple[StageConfig | None, TrackingConfig | None]:
    try:
        loaded = read_yaml(folder / CONFIG_FILE)
        stage = recorded(StageConfig, "stage", loaded["stage"])
        tracking = recorded(TrackingConfig, "tracking", loaded["tracking"])
    # Any damage to the file must not hide the rest of the run's state.
    except Exception:
        return None, None
    return stage, tracking


def pace(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Pairs per second over the log lines of the last line's phase; each covers the same number of pairs."""
    rates = [each.get("pairs_per_second", 0) for each in records if each.get("phase") == records[-1].get("phase")]
    return len(rates) / sum(1 / rate for rate in rates) if rates and min(rates) > 0 else None


def _spoke(folder: Path, record: dict[str, Any]) -> float | None:
    if not record:
        return None
    # Earlier versions did not write the time.
    return float(record["time"]) if "time" in record else (folder / METRICS_FILE).stat().st_mtime


def tracked_at(folder: Path, tracking: TrackingConfig | None) -> str | None:
    """Where a run's figures are beside its folder, or how to send them there; None if nowhere."""
    if tracking is None or tracking.mode == "disabled":
        return None
    if tracking.mode == "offline":
        runs = sorted((folder / "wandb").glob("offline-run-*"))
        return (
            f"offline: wandb sync {shell([str(folder)])}/wandb/offline-run-*"
            if runs
            else "offline: nothing written yet"
        )
    try:
        return (folder / WANDB_URL_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return f"online: project {tracking.project}"


def age(seconds: float) -> str:
    """A duration in its two largest units: "3 d 4 h", "12 min", "8 s"."""
    whole = max(0, round(seconds))
    for unit, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {name}" + (f" {rest} {smaller_name}" if rest and smaller > 1 else "")
    return f"{whole} s"


def ago(moment: float) -> str:
    return f"{age(time.time() - moment)} ago"


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
