"""The processes of one evaluation share the missing parts; rank 0 reports when all are done."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from vdtrain.config.command_schema import EvaluateConfig
from vdtrain.config.compose import ConfigError
from vdtrain.evaluation.evaluator import Evaluator
from vdtrain.inference.checkpoint import describe
from vdtrain.inference.sampler import settled
from vdtrain.run import distributed
from vdtrain.run.distributed import RankInfo
from vdtrain.run.lock import RunLock, take_together
from vdtrain.run.signals import SCHEDULER_SIGNALS, ending
from vdtrain.run.watchdog import DUMPS, Watchdog

FAILED = 1
# A share may take hours, and shares differ.
TIMEOUT_SECONDS = 7 * 24 * 3600.0


def run(config: EvaluateConfig, launch: Mapping[str, str]) -> int:
    """Evaluate; returns the exit status. After an error, one of several processes exits at once.

    Args:
        launch: the launcher's variables.

    Raises:
        ConfigError: on every process.
    """
    # All finished parts are on the disk. The status tells the scheduler to continue later.
    stop = partial(ending.leave, status=os.EX_TEMPFAIL)
    before = {number: signal.signal(number, stop) for number in SCHEDULER_SIGNALS}
    ending.at_once, ending.advice = dict.fromkeys(SCHEDULER_SIGNALS, os.EX_TEMPFAIL), "the same command continues"
    watchdog = Watchdog(config.watchdog_seconds, Path(config.output_dir) / DUMPS, int(launch["RANK"]))
    try:
        return _run(config, launch, watchdog)
    finally:
        watchdog.close()
        ending.at_once = {}
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(config: EvaluateConfig, launch: Mapping[str, str], watchdog: Watchdog) -> int:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = config.model if config.images or config.captions else describe(config).model
    config = settled(config, model)
    evaluator = Evaluator(config)
    alone = launch["WORLD_SIZE"] == "1"
    try:
        if alone:
            place = RankInfo(0, 0, 1, torch.device(config.device))
        else:
            place = distributed.start(config.device, TIMEOUT_SECONDS, control_only=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    lock = RunLock(Path(config.output_dir), "output_dir")
    try:
        # Two jobs would overwrite each other's drafts.
        take_together(lock, partial(watchdog.heartbeat, "waiting for the lock of output_dir"))
    except (ConfigError, distributed.SharedError) as error:
        distributed.finish()
        raise ConfigError(str(error)) from error
    try:
        try:
            _evaluate(evaluator, place, watchdog)
        finally:
            lock.release()
    except distributed.SharedError as error:
        raise ConfigError(str(error)) from error
    except ConfigError as error:
        ending.check()
        print(f"error: {error}", file=sys.stderr, flush=True)
        if place.world_size > 1:
            # A regular exit would wait for the other processes.
            sys.stdout.flush()
            os._exit(FAILED)
        return FAILED
    finally:
        distributed.finish()
    return 0


def _evaluate(evaluator: Evaluator, place: RankInfo, watchdog: Watchdog) -> None:
    distributed.watch(watchdog)
    watchdog.heartbeat("looking for what is missing")
    failure, missing = None, []
    if place.rank == 0:
        print(evaluator.said, file=sys.stderr, flush=True)
        for line in evaluator.remarks():
            print(f"warning: {line}", file=sys.stderr, flush=True)
        try:
            evaluator.parts.claim(evaluator.settings)
            missing = evaluator.missing()
        except ConfigError as error:
            failure = str(error)
    distributed.raise_if_any(failure)
    missing = distributed.broadcast_json(missing)
    # Flows of one part stay together, because they read the same pairs.
    numbers = sorted({number for number, _ in missing})[place.rank :: place.world_size]
    own = [(number, name) for number, name in missing if number in set(numbers)]
    if own:
        evaluator.make(own, place.device, watchdog.heartbeat, is_main=place.rank == 0)
    watchdog.heartbeat("waiting for the other processes")
    with distributed.following(watchdog):
        distributed.barrier()
    watchdog.heartbeat("reporting")
    if place.rank == 0:
        evaluator.report()
