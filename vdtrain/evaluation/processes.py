"""The processes of one evaluation share the missing parts; rank 0 reports when all are done."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from vdtrain.config.compose import ConfigError
from vdtrain.config.schema import EvaluateConfig
from vdtrain.evaluation.evaluator import Evaluator
from vdtrain.run import distributed
from vdtrain.run.connections import connection_problem
from vdtrain.run.distributed import RankInfo
from vdtrain.run.lock import RunLock, take_together
from vdtrain.run.signals import SCHEDULER_SIGNALS

FAILED, INTERRUPTED = 1, 130
# A share may take hours, and shares differ.
TIMEOUT_SECONDS = 7 * 24 * 3600.0


def run(config: EvaluateConfig, launch: Mapping[str, str]) -> int:
    """Evaluate; returns the exit status. After an error, one of several processes exits at once.

    Args:
        launch: the launcher's variables.

    Raises:
        ConfigError: on every process.
    """
    before = {number: signal.signal(number, _stop) for number in SCHEDULER_SIGNALS}
    try:
        return _run(config, launch)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    # All finished parts are on the disk. The status tells the scheduler to continue later.
    os._exit(os.EX_TEMPFAIL)


def _run(config: EvaluateConfig, launch: Mapping[str, str]) -> int:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    evaluator = Evaluator(config)
    alone = launch["WORLD_SIZE"] == "1"
    try:
        if alone:
            place = RankInfo(0, 0, 1, torch.device(config.device))
        else:
            place = distributed.start(config.device, TIMEOUT_SECONDS, control_only=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except RuntimeError as error:
        problem = connection_problem(error)
        if problem is None:
            raise
        print(f"error: process {launch['RANK']}: {problem}", file=sys.stderr, flush=True)
        return FAILED
    lock = RunLock(Path(config.output_dir), "output_dir")
    try:
        # Two jobs would overwrite each other's drafts.
        take_together(lock)
    except (ConfigError, distributed.SharedError) as error:
        distributed.finish()
        raise ConfigError(str(error)) from error
    try:
        try:
            _evaluate(evaluator, place)
        finally:
            lock.release()
    except distributed.SharedError as error:
        raise ConfigError(str(error)) from error
    except KeyboardInterrupt:
        return _end(place, "interrupted; the same command continues", INTERRUPTED)
    except ConfigError as error:
        return _end(place, f"error: {error}", FAILED)
    except RuntimeError as error:
        problem = connection_problem(error)
        if problem is None:
            raise
        return _end(place, f"error: process {place.rank}: {problem}", FAILED)
    finally:
        distributed.finish()
    return 0


def _evaluate(evaluator: Evaluator, place: RankInfo) -> None:
    failure, missing = None, []
    if place.rank == 0:
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
        evaluator.make(own, place.device, is_main=place.rank == 0)
    distributed.barrier()
    if place.rank == 0:
        evaluator.report()


def _end(place: RankInfo, line: str, status: int) -> int:
    print(line, file=sys.stderr, flush=True)
    if place.world_size > 1:
        # A regular exit would wait for the other processes.
        sys.stdout.flush()
        os._exit(status)
    return status
