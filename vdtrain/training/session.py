"""One process of a training run, from joining the process group to its exit status."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vdtrain.checkpoint.folder import CheckpointError
from vdtrain.checkpoint.store import Verification
from vdtrain.config.command import memory_problem
from vdtrain.config.compose import ConfigError
from vdtrain.config.instantiate import differences
from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import micro_batches
from vdtrain.data.manifest import ManifestError
from vdtrain.data.stream import StreamError
from vdtrain.engine.deepspeed import strategy_line
from vdtrain.errors import described, one_line, unwritable
from vdtrain.redaction import redacted
from vdtrain.run import distributed
from vdtrain.run.connections import connection_problem
from vdtrain.run.lock import RunLock, take_together
from vdtrain.run.processes import started_by_command
from vdtrain.run.restarts import record_start
from vdtrain.run.signals import StopSignal, ending
from vdtrain.run.watchdog import DUMPS, Watchdog, record_collectives
from vdtrain.tracking.reporting import environment_of
from vdtrain.tracking.summary import CONFIG_FILE, next_command, read_config
from vdtrain.tracking.surroundings import processor
from vdtrain.training.agreement import DataError, agree_on_settings
from vdtrain.training.build import build_trainer
from vdtrain.training.continuation import stage_steps
from vdtrain.training.start import Start, check_frozen, resolve_start
from vdtrain.training.trainer import Trainer

FAILED = 1
# EX_TEMPFAIL: the launcher should restart the run. After Ctrl-C, a person decides.
STOPPED, INTERRUPTED = os.EX_TEMPFAIL, 128 + signal.SIGINT
SHARED_ERRORS = (CheckpointError, distributed.SharedError)
# Collectives time out after the watchdog, which knows where each process stands and reports first.
TIMEOUT_OVER_WATCHDOG = 2.0


def run(config: TrainConfig, raw_config: DictConfig, rank: int, stop: StopSignal, overrides: Sequence[str] = ()) -> int:
    """Train a stage whose configuration has been checked.

    Args:
        stop: signals received since the process started; it records Ctrl-C too once there is something to save.
        overrides: of the command line, for the next stage's command.

    Returns:
        Exit status, equal on every process: 0 if the stage is complete, 75 if it was stopped and saved, by a signal
        or because the data of a process could not be read for a while, 130 after Ctrl-C, 1 after an error. A known
        error prints one line; its traceback is in the process's record. One of several processes exits at once after
        an error, and with the watchdog's status if it hangs.

    Raises:
        ConfigError: on every process.
    """
    _allow_open_files()
    dumps = Path(config.run_dir) / DUMPS
    watchdog = Watchdog(config.watchdog_seconds, dumps, rank)
    try:
        record_collectives(dumps)
        complete = _train(config, raw_config, stop, watchdog)
        # All processes meet here: one that ended early could end the others.
        interrupted = not distributed.all_agree(not stop.interrupted)
        if complete and rank == 0:
            print(f"{config.stage.name} is complete; next: {next_command(config, overrides)}", flush=True)
        return 0 if complete else INTERRUPTED if interrupted else STOPPED
    except ConfigError:
        raise
    except Exception as error:
        watchdog.record(f"process {rank} ended by an error", error)
        line = _line(error, rank)
        if (problem := memory_problem(error, config)) is not None:
            line = f"process {rank}: {problem}"
        if line is not None and watchdog.absence and connection_problem(error) is not None:
            # The others did not wait for it.
            absence = f"did not run for {watchdog.absence:.0f} s and lost the others"
            line = f"process {rank}: {absence}; run the same command again"
        if stop.interrupted and connection_problem(error) is not None:
            # Ctrl-C ended another process that had not begun to train.
            ending.leave(signal.SIGINT)
        if line is None:
            traceback.print_exception(error)
        elif line:
            print(f"error: {line}", file=sys.stderr, flush=True)
        if isinstance(error, SHARED_ERRORS):
            # All processes meet here: to the others, one that left early would look lost.
            with contextlib.suppress(RuntimeError):
                distributed.barrier()
        data_error = error if isinstance(error, DataError) else None
        status = STOPPED if data_error is not None and data_error.passes else FAILED
        if distributed.world_size() > 1 or (data_error is not None and data_error.stuck):
            # A regular end would wait for the others, which wait for this process, or for a read without an end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status
    finally:
        distributed.finish()
        watchdog.close()


def _train(config: TrainConfig, raw_config: DictConfig, stop: StopSignal, watchdog: Watchdog) -> bool:
    """True if the stage is complete; else it was stopped by a signal."""
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    # Report mistaken settings at once. The processes verify the files together, below.
    early = Start()
    with contextlib.suppress(CheckpointError), watchdog.patient("looking for the checkpoint"):
        early = resolve_start(config, raw_config, Verification.SIZES)
    limit = config.watchdog_seconds
    timeout = distributed.TIMEOUT_SECONDS if limit is None else TIMEOUT_OVER_WATCHDOG * limit
    # Imports from a slow disk take long too.
    with watchdog.patient("joining the other processes"):
        place = distributed.start(config.hardware.device, timeout)
    distributed.watch(watchdog)
    agree_on_settings(raw_config)
    lock = RunLock(Path(config.run_dir))
    try:
        waiting = "waiting for the run folder's lock"
        # A complete run may be on a read-only disk.
        take_together(lock, lambda: watchdog.heartbeat(waiting), needed=not _is_complete(early, config))
        with watchdog.patient("looking for the checkpoint to start from"):
            start = resolve_start(config, raw_config)
            if _is_complete(start, config):
                return True
            remarks = [*start.remarks, *check_frozen(start, config)]
            _begin(config, raw_config, start, place, remarks)
            watchdog.heartbeat("building the model")
            with distributed.company():
                trainer = build_trainer(config, raw_config, start, place, watchdog)
            _say_where(config, trainer, place)
        stop.save_first()
        complete = trainer.run(stop)
        if not complete and place.rank == 0:
            print(f"saved step {trainer.state.step}; the same command goes on", flush=True)
        return complete
    finally:
        lock.release()


def _allow_open_files() -> None:
    """Raise the limit on open files to the most that the system allows: shards, sockets and W&B need many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))


def _is_complete(start: Start, config: TrainConfig) -> bool:
    return start.position is not None and start.position.completes(stage_steps(config.stage))


def _begin(
    config: TrainConfig, raw_config: DictConfig, start: Start, place: distributed.RankInfo, remarks: Sequence[str]
) -> None:
    """Record the start in the run folder and print it."""
    step = 0 if start.position is None else start.position.step
    distributed.raise_if_any(_prepare_folder(config, raw_config, step) if place.rank == 0 else None)
    if place.rank == 0:
        origin = (
            f"continues from {start.resume}" if start.resume else f"starts from {start.weights or 'random weights'}"
        )
        print(f"{config.stage.name} {origin}", flush=True)
        print(f"run folder: {Path(config.run_dir).absolute()}", flush=True)
        print(f"{_processes(config, place)}; {strategy_line(config.hardware, place.world_size)}", flush=True)
        print(f"micro-batches of each process: {_micro_batches(config, place.world_size)}", flush=True)
        for line in start.notes:
            print(line, flush=True)
        for line in remarks:
            print(f"warning: {line}", file=sys.stderr, flush=True)


def _processes(config: TrainConfig, place: distributed.RankInfo) -> str:
    """Processes, nodes and precision: "16 processes on 2 nodes, each on a NVIDIA H100 in bf16"."""
    count, nodes = place.world_size, len({str(machine) for machine, *_ in distributed.peers()})
    processes = f"{count} processes on {nodes} node{'s' * (nodes != 1)}, each" if count > 1 else "one process"
    device = torch.cuda.get_device_name() if config.hardware.device == "cuda" else f"the CPU ({processor()})"
    return f"{processes} on {device} in {config.hardware.precision}"


def _say_where(config: TrainConfig, trainer: Trainer, place: distributed.RankInfo) -> None:
    """Say how large the model is; on a node without process 0, say where the log is."""
    if place.rank == 0:
        weights = [(each.numel(), each.requires_grad) for each in trainer.engine.module.parameters()]
        trained, carried = (sum(size for size, trains in weights if trains is kind) for kind in (True, False))
        frozen = sum(each.numel() for each in trainer.objective.frozen.parameters())
        kept = f"{carried:,} carried along unchanged, {frozen:,} in frozen encoders and VAEs"
        print(f"parameters: {trained:,} trained, {kept}", flush=True)
    elif started_by_command() and place.local_rank == 0:
        host = distributed.peers()[0][0][0]
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        last = place.rank + here - 1
        print(f"processes {place.rank} to {last} of {place.world_size} run here; process 0, on {host}, writes the log")


def _micro_batches(config: TrainConfig, world_size: int) -> str:
    """Number and size of the micro-batches of a step at each resolution: "2 x 32 pairs at 256 pixels"."""
    local = config.stage.global_batch_size // world_size
    counts = {phase.resolution: micro_batches(config, phase.resolution, world_size) for phase in config.stage.phases}
    return ", ".join(f"{count} x {local // count} pairs at {pixels} pixels" for pixels, count in counts.items())


def _prepare_folder(config: TrainConfig, raw_config: DictConfig, step: int) -> str | None:
    """Write the configuration and the start into the run folder; a line on what failed, or None."""
    run_dir, total = Path(config.run_dir), sum(stage_steps(config.stage))
    try:
        shown: Any = redacted(OmegaConf.to_container(raw_config, resolve=True))
        before = read_config(run_dir)
        changed = differences(before, shown) if before else {}
        OmegaConf.save(OmegaConf.create(shown), run_dir / CONFIG_FILE)
        here = environment_of(config)
        record_start(run_dir, step, total, config.max_restarts, here["processes"], here["hosts"], changed, here)
    except OSError as error:
        return f"run_dir={run_dir}: {unwritable(error, run_dir)}"
    return None


def _line(error: Exception, rank: int) -> str | None:
    """The message this rank prints: "" if another rank prints it, None if the error is unexpected."""
    text = one_line(error)
    if isinstance(error, SHARED_ERRORS):
        return text if rank == 0 else ""
    if isinstance(error, StreamError | ManifestError):
        return f"process {rank}: {text}"
    problem = described(error) if isinstance(error, OSError) else connection_problem(error)
    return problem and f"process {rank}: {problem}"
