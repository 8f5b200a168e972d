"""The rehearsal's own road, with the tiny model: what `make rehearsal` walks at full size."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import rehearsal
from rehearsal_road import SIZES, Part, road

from tests.programs import free_port, program

ROOT = Path(__file__).parents[1]
# Where a process of a test finds the rehearsal.
PATHS = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}


def with_forks() -> int:
    """The rehearsal, whose commands are this session's programs: torchrun's children are callers of forks."""

    def training_processes(pid: int) -> list[psutil.Process]:
        ranks = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == folder and "RANK" in process.environ() and "-IS" in process.cmdline():
                    ranks.append(process)
        return ranks or [psutil.Process(pid)]

    folder = str(Path(sys.argv[sys.argv.index("--folder") + 1]).resolve())
    rehearsal.training_processes = training_processes
    return rehearsal.main()


@pytest.mark.slow
def test_the_whole_road_with_the_tiny_model(tmp_path: Path) -> None:
    folder = tmp_path / "rehearsal"
    code = f"import sys, {__name__} as test; sys.exit(test.with_forks())"
    command = [program("python"), "-c", code, "--size", "tiny", "--folder", str(folder), "--port", str(free_port())]
    walked = subprocess.run(command, cwd=tmp_path, env=PATHS, capture_output=True, text=True, timeout=600)
    assert walked.returncode == 0, walked.stderr
    table = (folder / "table.md").read_text()
    parts = [part.name for part in road(SIZES["tiny"], 0)]
    assert all(f"| {name} |" in table for name in parts)
    assert table in walked.stdout
    # What is large is gone.
    assert sorted(path.name for path in folder.iterdir()) == ["logs", "table.md"]
    assert len(list((folder / "logs").iterdir())) == len(parts)


def test_both_sizes_walk_the_same_road() -> None:
    full, tiny = ([part.name for part in road(size, 0)] for size in (SIZES["full"], SIZES["tiny"]))
    assert full == tiny
    assert len(set(full)) == len(full)


def part(name: str, code: str, **more: tuple[str, ...]) -> Part:
    return Part(name, (f"python -c '{code}'",), **more)


def test_a_part_that_fails_ends_it_and_the_next_start_begins_there(tmp_path: Path) -> None:
    parts = [
        part("first", 'open("first", "x")', makes=("first",), drops=("large",)),
        part("second", 'print("so far"); raise SystemExit(3)', makes=("half",)),
    ]
    (tmp_path / "large").mkdir()
    (tmp_path / "half").touch()
    with pytest.raises(rehearsal.PartError) as failed:
        rehearsal.walk(parts, tmp_path)
    lines = str(failed.value).splitlines()
    assert lines[0] == "second: a command ended with status 3"
    assert lines[1] == f"$ {parts[1].commands[0]}"
    assert lines[2] == "so far"
    assert not (tmp_path / "large").exists()
    assert not (tmp_path / "half").exists()
    mended = part("second", 'open("second", "x")')
    measured = rehearsal.walk([parts[0], mended], tmp_path)
    assert [record["part"] for record in measured] == ["first", "second"]
    assert (tmp_path / "second").exists()
    assert "| **all 2 parts:" in rehearsal.table(measured)


def test_a_part_that_does_not_say_what_it_is_to_say_fails(tmp_path: Path) -> None:
    """A run that begins anew in place of going on ends with status 0 all the same."""
    with pytest.raises(rehearsal.PartError, match="resume: 'continues from' was not said"):
        rehearsal.walk([Part("resume", ("python -c 'print(\"starts\")'",), says="continues from")], tmp_path)
    rehearsal.walk([Part("resume", ("python -c 'print(\"continues from\")'",), says="continues from")], tmp_path)


def test_memory_of_a_part_is_that_of_all_its_processes(tmp_path: Path) -> None:
    grow = 'import subprocess, sys, time; a = b"x" * 10**8; time.sleep(0.5)'
    both = (
        f'import subprocess, sys; child = subprocess.Popen([sys.executable, "-c", """{grow}"""]); {grow}; child.wait()'
    )
    # In a process of its own, for this one has children.
    code = (
        "import sys; from pathlib import Path; import rehearsal; "
        "rehearsal.walk([rehearsal.Part('grow', (sys.argv[1],))], Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, *part("grow", both).commands, str(tmp_path)]
    subprocess.run(command, env=PATHS, check=True, timeout=120)
    (record,) = json.loads((tmp_path / rehearsal.STATE_FILE).read_text())
    assert 0.2 < record["own_GB"] < 0.3
    assert record["seconds"] > 0.5


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    """The rehearsal ends what it started, and what that started."""
    sleeper = f"import time; open({str(tmp_path / 'started')!r}, 'w'); time.sleep(600)"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import rehearsal; "
        f"rehearsal.road = lambda *_: [rehearsal.Part('sleep', ({f'python -c {json.dumps(sleeper)}'!r},))]; "
        "sys.exit(rehearsal.main(['--size', 'tiny', '--folder', 'out']))"
    )
    walked = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT / "benchmarks")], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.05)
    walked.send_signal(signal.SIGINT)
    _, said = walked.communicate(timeout=60)
    assert walked.returncode == 128 + signal.SIGINT
    assert said == "stopped; the same command begins again with this part\n"
    assert not any(str(tmp_path) in line for line in command_lines())


def command_lines() -> list[str]:
    """Of all processes; one may end while it is looked at."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().decode(errors="replace"))
    return lines


def test_a_machine_that_is_too_small_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    size = SIZES["tiny"]
    monkeypatch.setattr(rehearsal, "SIZES", {"tiny": type(size)(**{**vars(size), "memory": 10**6})})
    assert rehearsal.main(["--size", "tiny", "--folder", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: --folder={tmp_path / 'out'}: ")
    assert "GB of memory free, and the rehearsal takes 1000000; " in shown
    assert shown.count("\n") == 1


def test_the_page_shows_the_recorded_figures() -> None:
    result = json.loads(rehearsal.RESULT.read_text())
    assert f"{result['machine']}:\n\n{rehearsal.table(result['parts'])}" in rehearsal.PAGE.read_text()
    assert [record["part"] for record in result["parts"]] == [part.name for part in road(SIZES["full"], 0)]
