"""What is said of runs from their files alone."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_runs import BATCH, JOB, LOW, STEPS, TinyRuns
from vdtrain.commands.status import main
from vdtrain.run.restarts import RECORD_FILE
from vdtrain.tracking.metrics import METRICS_FILE, last_metrics, read_metrics
from vdtrain.tracking.summary import CONFIG_FILE, age, summarise
from vdtrain.tracking.wandb_run import WANDB_URL_FILE


@pytest.fixture
def run(tiny_runs: TinyRuns, tmp_path: Path) -> Path:
    """A copy of stage 2's run."""
    return Path(shutil.copytree(tiny_runs.run(2), tmp_path / "stage2_dual_flow"))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """What the command prints, by the words at the beginnings of its lines."""
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return {line[:12].strip(): line[12:] for line in printed.out.splitlines()}


def test_a_stopped_run(tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_runs.run(2)
    step = read_metrics(folder)[-1]["step"]
    lines = shown(capsys, str(folder))
    phase = "1 of 2 (32 px)" if step < LOW else "2 of 2 (64 px)"
    assert lines["stage"] == f"stage2_dual_flow, phase {phase}"
    assert lines["samples"].startswith(
        f"{step * BATCH} of {STEPS * BATCH} ({step / STEPS:.0%}), step {step} of {STEPS}"
    )
    assert "pairs/s" in lines["speed"]
    assert lines["losses"].count("0.") + lines["losses"].count("1.") == 2
    assert lines["checkpoint"].startswith(f"step {step}, ")
    assert "whole by its sizes" in lines["checkpoint"]
    assert lines["restarts"].startswith("1, last started ")
    assert lines["processes"].endswith(f", job {JOB}")
    assert lines["last line"].endswith(" ago")
    assert "W&B" not in lines
    assert "trouble" not in lines


def test_a_complete_run_and_how_its_figures_go_to_wandb(
    tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_runs.run(1)
    lines = shown(capsys, str(folder))
    assert lines["stage"] == "stage1_single_flow, phase 2 of 2 (64 px)"
    assert lines["time left"] == "complete"
    assert lines["restarts"].startswith("none, started ")
    assert lines["W&B"] == f"offline: wandb sync {folder}/wandb/offline-run-*"
    assert list((folder / "wandb").glob("offline-run-*"))


def test_a_folder_of_runs_is_a_line_for_each(tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"run_dir={tiny_runs.folder}/runs"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("stage1_single_flow  20 of 20 (100%) ")
    assert "complete" in first
    assert second.startswith("stage2_dual_flow ")
    assert "pairs/s" in second
    assert f"checkpoint {read_metrics(tiny_runs.run(2))[-1]['step']}" in second


def test_time_left_is_that_of_the_pace(run: Path) -> None:
    """Phases of larger images make it a lower bound."""
    records = [{**read_metrics(run)[-1], "step": step, "samples": step * BATCH} for step in (1, 2)]
    rates = (2.0, 6.0)
    lines = [{**record, "pairs_per_second": rate} for record, rate in zip(records, rates, strict=True)]
    (run / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = summarise(run)
    # 8 pairs in 4 / 2 + 4 / 6 seconds.
    assert summary.pairs_per_second == pytest.approx(3.0)
    assert summary.seconds_left == pytest.approx((STEPS * BATCH - summary.samples) / 3.0)
    assert summary.larger_phases == (summary.step < LOW)


def test_troubles_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = {**read_metrics(run)[-1], "skipped": 3, "failed_saves": 0, "time": time.time() - 7400}
    with (run / METRICS_FILE).open("a") as file:
        file.write(json.dumps(last) + "\n" + '{"step": 9, "lo')
    newest = max((run / "checkpoints").glob("step-*"))
    (newest / "rank-00000-of-00001.safetensors").write_bytes(b"half of it")
    (run / "dumps").mkdir(exist_ok=True)
    (run / "dumps" / "rank-0.txt").write_text("a record")
    lines = shown(capsys, str(run))
    assert lines["last line"] == "2 h 3 min ago"
    assert "10 bytes instead of" in lines["damaged"]
    assert lines["checkpoint"] == "none yet"
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    assert "trouble     3 skipped steps" in text
    assert "failed saves" not in text
    assert f"see {run}/dumps" in text


def test_a_run_without_a_line_yet_and_one_of_an_earlier_version(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("checkpoints", METRICS_FILE):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = shown(capsys, str(run))
    assert lines["last line"] == "none yet"
    assert lines["time left"] == "not known yet"
    assert lines["checkpoint"] == "none yet"
    assert "losses" not in lines
    # No record of starts, no time in the lines, no configuration that this version reads.
    (run / METRICS_FILE).write_text(
        json.dumps(
            {
                "step": 2,
                "phase": 0,
                "resolution": 32,
                "samples": 8,
                "total_samples": 20,
                "learning_rate": 1e-4,
                "skipped": 0,
                "loss": {"text-to-image": 0.5},
                "pairs_per_second": 4.0,
                "data_wait": 0.25,
            }
        )
        + "\n"
    )
    (run / RECORD_FILE).unlink()
    (run / CONFIG_FILE).write_text("stage: {name: [")
    lines = shown(capsys, str(run))
    assert lines["stage"] == "stage2_dual_flow, phase 1 of 1 (32 px)"
    assert lines["samples"] == "8 of 20 (40%), step 2 of 5"
    assert lines["time left"] == "3 s"
    assert lines["losses"] == "text-to-image 0.5000 (step 2)"
    assert "restarts" not in lines


def test_the_address_of_an_online_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run / CONFIG_FILE
    config.write_text(config.read_text().replace("mode: disabled", "mode: online"))
    assert shown(capsys, str(run))["W&B"] == "online: project vdtrain"
    (run / WANDB_URL_FILE).write_text("https://wandb.example/team/vdtrain/runs/1\n")
    assert shown(capsys, str(run))["W&B"] == "https://wandb.example/team/vdtrain/runs/1"


def test_the_newest_lines_of_a_long_log(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": {"text-to-image": 0.5}}) + "\n" for step in range(9000)]
    (tmp_path / METRICS_FILE).write_text("".join(lines))
    assert (tmp_path / METRICS_FILE).stat().st_size > 1 << 18
    assert [record["step"] for record in last_metrics(tmp_path, 3)] == [8997, 8998, 8999]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{folder}/nowhere"], "nowhere: does not exist"),
        (["{folder}"], "holds no run"),
        (["a", "b"], "'b': too many plain arguments; write RUN_DIR"),
        (["{folder}", "watch=0"], "watch=0: must be above 0; null prints once"),
        (["{folder}", "wtach=1"], "did you mean 'watch'?"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert expected in printed.err


def test_watching_needs_a_terminal(tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_runs.run(1)), "watch=1"]) == 2
    assert "watch=1: needs a terminal" in capsys.readouterr().err


def test_watching_looks_again_until_interrupted(tiny_runs: TinyRuns) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "vdtrain.cli", "status", str(tiny_runs.run(1)), "watch=0.05"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True)
    os.close(terminal)
    text = b""
    try:
        while text.count(b"last line") < 3:
            text += os.read(controller, 4096)
        process.send_signal(2)
        # What is printed until the signal arrives must be taken, or the process waits for room.
        while True:
            try:
                if not (more := os.read(controller, 4096)):
                    break
                text += more
            except OSError:
                break
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    assert b"Traceback" not in text
    assert text.endswith(b"stopped by Ctrl-C\r\n")


def test_no_pytorch_is_imported(tiny_runs: TinyRuns) -> None:
    script = (
        "import sys; from vdtrain.cli import main; status = main(sys.argv[1:]); "
        "print(status, sorted({'torch', 'deepspeed', 'wandb', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, "status", f"{tiny_runs.folder}/runs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_lengths_of_time() -> None:
    lengths = {0.4: "0 s", 59: "59 s", 61: "1 min", 3600: "1 h", 3660: "1 h 1 min", 90000: "1 d 1 h", 172800: "2 d"}
    assert {seconds: age(seconds) for seconds in lengths} == lengths
