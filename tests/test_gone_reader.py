"""A reader that goes away, as `head` does, and a full disk behind `>`: every command ends in order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.settings import phases
from tests.world import TRAIN

GONE = 141
# Each prints in a way of its own, or is a program of its own; the others repeat them.
COMMANDS = [
    "vdtrain",
    "vdtrain --help",
    "vdtrain --version",
    "vdtrain nonsense",
    "vdtrain plan --cfg job",
    "vdtrain data",
    "vdtrain data index --help",
    "miniature --help",
    "vdtrain.commands.run_folder",
    "vdtrain.run.restarts --help",
]
OTHERS = [
    "vdtrain sample --help",
    "vdtrain sample gone",
    "vdtrain train --help",
    "data_pipeline --help",
    "data_pipeline inspect --help",
    "data_pipeline latents --help",
    "miniature draw --help",
]


def start(
    command: str, folder: Path, unbuffered: bool, more: Sequence[str] = (), **streams: int
) -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    words = [sys.executable, "-m", *command.split(), *more]
    return subprocess.run(words, cwd=folder, env=environment, timeout=120, check=False, **streams)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("command", [*COMMANDS, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
def test_a_reader_that_is_gone_ends_a_command_without_a_word(tmp_path: Path, command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    unbuffered = len(command) % 2 == 0
    done = start(command, tmp_path, unbuffered, stdout=writer, stderr=subprocess.PIPE)
    # A mistake is said on standard error, and is the end of a command that has printed nothing else.
    mistaken = command in ("vdtrain nonsense", "vdtrain sample gone")
    assert done.returncode == (2 if mistaken else GONE), done.stderr
    assert done.stderr.count(b"\n") == mistaken, done.stderr
    # The same with both outputs in the pipe, as with `2>&1 | head`.
    assert start(command, tmp_path, unbuffered, stdout=writer, stderr=writer).returncode == GONE
    os.close(writer)


@pytest.mark.slow
def test_training_whose_log_nobody_reads_ends_in_order(tmp_path: Path, origin: Path) -> None:
    small = ["stage.global_batch_size=2", "hardware.micro_batch_size={32:1,64:1}", "log_every_steps=1"]
    words = [word.replace("FOLDER", str(origin)) for word in TRAIN]
    reader, writer = os.pipe()
    os.close(reader)
    more = ["stage=stage1_single_flow", *words, *small, phases(2, (32, 8)), "run_dir=run"]
    done = start("vdtrain train", tmp_path, True, more, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 1, GONE), done.stderr


def test_a_full_disk_behind_the_output_is_one_line(tmp_path: Path) -> None:
    for command in ("vdtrain --help", "miniature --help", "vdtrain sample --help"):
        for unbuffered in (False, True):
            full = os.open("/dev/full", os.O_WRONLY)
            done = start(command, tmp_path, unbuffered, stdout=full, stderr=subprocess.PIPE)
            os.close(full)
            assert done.returncode == 1
            (line,) = done.stderr.decode().splitlines()
            assert line.startswith("error: "), line
            assert "No space left on device" in line
