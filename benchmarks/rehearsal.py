"""The whole full-size road on a CPU: published weights in, three stages, samples, figures, weights out.

python benchmarks/rehearsal.py [--size full|tiny] [--folder rehearsal] [--record]

`make rehearsal` runs it. Every command is one of the documents, with the settings that make it small enough for two
cores: made-up weights are written as the real ones were published, at full size, and imported; then a diffuser of full
depth and a quarter of the width is trained beside the frozen parts at full size. A part that fails ends the rehearsal
with its command and the end of its log; the same command then begins again with that part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import psutil
from rehearsal_road import SIZES, Interruption, Part, Size, road
from watched import GB, Watched, disk_bytes

from vdtrain.tracking.metrics import read_metrics
from vdtrain.tracking.surroundings import processor

HERE = Path(__file__).parent
RESULT, PAGE = HERE / "results" / "rehearsal.json", HERE.parent / "docs" / "rehearsal.md"
TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end -->)", re.DOTALL)
STATE_FILE, LOGS = "rehearsal.json", "logs"
STOPPED = os.EX_TEMPFAIL
TAIL_LINES = 25
POLL_SECONDS = 0.05
SERVER_SECONDS = 120.0


class PartError(RuntimeError):
    """A part did not do what it is to do."""


def start(command: str, folder: Path, log: IO[str]) -> subprocess.Popen[bytes]:
    """Start a command as it is typed in `folder`, with the programs of this interpreter's environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        shlex.split(command),
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def walk(parts: Sequence[Part], folder: Path) -> list[dict[str, Any]]:
    """Walk the parts that are still to be walked; returns what was measured of each.

    Raises:
        PartError: one failed.
    """
    state = folder / STATE_FILE
    measured: list[dict[str, Any]] = json.loads(state.read_text()) if state.exists() else []
    done = {record["part"] for record in measured}
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts, start=1):
        if part.name in done:
            continue
        log = folder / LOGS / f"{number:02d}.log"
        with Watched(folder) as watched:
            _walk_part(part, folder, log)
        record = {
            "part": part.name,
            "seconds": round(watched.seconds, 1),
            "own_GB": round(watched.own / GB, 2),
            "resident_GB": round(watched.resident / GB, 2),
            "disk_GB": round(watched.disk / GB, 2),
        }
        measured.append(record)
        _remove(folder, part.drops)
        draft = state.with_suffix(".tmp")
        draft.write_text(json.dumps(measured, indent=1))
        draft.replace(state)
        print(f"{number:2d}/{len(parts)}  {'  '.join(f'{name} {value}' for name, value in record.items())}", flush=True)
    return measured


def _walk_part(part: Part, folder: Path, log: Path) -> None:
    _remove(folder, part.makes)
    with log.open("w") as file, _served(part, folder, file):
        for command in part.commands:
            print(f"$ {command}", file=file, flush=True)
            with _ended(start(command, folder, file)) as process:
                if part.interruption is not None:
                    _interrupt(part.interruption, process, folder)
                status = process.wait()
            # torchrun has a status of its own, and says those of its processes.
            stopped = status == STOPPED or (command.startswith("torchrun") and _ranks_stopped(log))
            if not (stopped if part.interruption else status == 0):
                said = log.read_text(errors="replace").rpartition(f"$ {command}\n")[2].splitlines()[-TAIL_LINES:]
                end = "\n".join((f"$ {command}", *said, f"(all of it: {log})"))
                raise PartError(f"{part.name}: a command ended with status {status}\n{end}")
        if part.says not in log.read_text(errors="replace"):
            raise PartError(f"{part.name}: {part.says!r} was not said\n$ {part.commands[0]}\n(what was: {log})")


@contextlib.contextmanager
def _served(part: Part, folder: Path, log: IO[str]) -> Iterator[None]:
    """Runs the part's server, if it has one, from when it answers."""
    if part.server is None:
        yield
        return
    command, port = part.server
    with _ended(start(command, folder, log)) as process:
        until = time.monotonic() + SERVER_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > until:
                raise PartError(f"{part.name}: no answer at port {port}\n$ {command}")
            time.sleep(POLL_SECONDS)
        yield


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, which is gone with all that it started when the block is left."""
    try:
        yield process
    finally:
        if process.poll() is None:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()


def _interrupt(interruption: Interruption, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Send the signal to the processes that train, as schedulers do, when the step has been recorded."""
    while process.poll() is None:
        records = read_metrics(folder / interruption.run)
        if records and records[-1]["step"] >= interruption.step:
            for rank in training_processes(process.pid):
                rank.send_signal(interruption.number)
            return
        time.sleep(POLL_SECONDS)


def training_processes(pid: int) -> list[psutil.Process]:
    """The children of torchrun, or else the process itself, without those that W&B has."""
    started = psutil.Process(pid)
    ranks = [child for child in started.children() if " -m vdtrain train " in " ".join(child.cmdline())]
    return ranks or [started]


def _ranks_stopped(log: Path) -> bool:
    return re.search(rf"exitcode\s*: {STOPPED}\b", log.read_text(errors="replace")) is not None


def _remove(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def shortage(size: Size, folder: Path) -> str | None:
    """What the machine has too little of; None if there is enough."""
    folder.mkdir(parents=True, exist_ok=True)
    # What an interrupted rehearsal left there is a part of what it takes.
    disk = (shutil.disk_usage(folder).free + disk_bytes(folder)) / GB
    memory = psutil.virtual_memory().available / GB
    for what, free, needed in (("the disk", disk, size.disk), ("memory", memory, size.memory)):
        if free < needed:
            return f"--folder={folder}: {free:.0f} GB of {what} free, and the rehearsal takes {needed:.0f}; make room"
    return None


def table(measured: Sequence[dict[str, Any]]) -> str:
    """The parts as a Markdown table."""
    head = ("part", "seconds", "memory of its own, GB", "with pages of files, GB", "disk, GB")
    rows = [(r["part"], r["seconds"], r["own_GB"], r["resident_GB"], r["disk_GB"]) for r in measured]
    most = [max(row[column] for row in rows) for column in (2, 3, 4)]
    total = round(sum(row[1] for row in rows))
    rows.append((f"**all {len(rows)} parts: {total // 60} min {total % 60} s**", total, *most))
    lines = [head, ("---", *["---:"] * 4), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def machine() -> str:
    """The processor, how much of it there is, and the memory."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / GB
    return f"{processor()}, {cores} cores, {memory:.0f} GB of memory"


def record(measured: Sequence[dict[str, Any]]) -> None:
    """Keep the figures of this machine with the project, and put their table into the page about it."""
    result = {"machine": machine(), "seconds": round(sum(part["seconds"] for part in measured)), "parts": measured}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    text = f"{machine()}:\n\n{table(measured)}"
    PAGE.write_text(TABLE.sub(lambda _: text, PAGE.read_text()))


def main(argv: Sequence[str] | None = None) -> int:
    """Walk the road; returns the exit status: 1 if a part failed, 2 if the machine is too small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--folder", type=Path, default=Path("rehearsal"), help="where everything is written")
    parser.add_argument("--port", type=int, default=8766, help="free one of this machine, for the drawn images")
    parser.add_argument("--record", action="store_true", help=f"keep the figures in {RESULT.name} and {PAGE.name}")
    arguments = parser.parse_args(argv)
    size, folder = SIZES[arguments.size], arguments.folder
    if (lack := shortage(size, folder)) is not None:
        print(f"error: {lack}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measured = walk(road(size, arguments.port), folder)
    except PartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command begins again with this part", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"\n{machine()}\n\n{table(measured)}", end="")
    (folder / "table.md").write_text(f"{machine()}\n\n{table(measured)}")
    if arguments.record:
        record(measured)
    _remove(folder, [path.name for path in folder.iterdir() if path.name not in (LOGS, "table.md")])
    return 0


if __name__ == "__main__":
    sys.exit(main())
