"""Small files of a run folder that are not what they should be: one line, no traceback, and nothing begun anew."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cases import with_slow
from tests.tiny_runs import STAGES, STEPS, TinyRuns
from tests.world import MAINS
from vdtrain.checkpoint.folder import CHECKPOINTS, FORMAT, INDEX_FILE, LATEST_FILE, candidates, index_checksum
from vdtrain.run.restarts import RECORD_FILE
from vdtrain.tracking.metrics import METRICS_FILE
from vdtrain.tracking.summary import SAVED_FILE

BEFORE = 4


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tiny_runs: TinyRuns, tmp_path: Path) -> Path:
    """A copy of stage 1's run, which is complete; it keeps the checkpoints of its last two saves."""
    copy = Path(shutil.copytree(tiny_runs.run(1), tmp_path / "run"))
    assert [path.name for path in candidates(copy / CHECKPOINTS)] == ["step-000000005", "step-000000004"]
    return copy


def commands(tiny_runs: TinyRuns, run: Path) -> dict[str, list[str]]:
    """Every command that reads a run folder."""
    sampler = [f"checkpoint={run}", "resolution=32", "steps=1", "threads=1"]
    out = run.parent / "out"
    return {
        "train": ["vdtrain", "train", f"stage={STAGES[0]}", *tiny_runs.overrides, f"run_dir={run}"],
        "sample": ["vdtrain", "sample", *sampler, "flow=text-to-image", "inputs=[a]", f"output_dir={out}"],
        "evaluate": [
            *["vdtrain", "evaluate", *sampler, f"data.manifest={tiny_runs.folder}/data/manifest", f"output_dir={out}"],
            *["flows=[image-to-image]", "samples=2", "part_samples=2", "loader_workers=1"],
        ],
        "export": ["vdtrain", "weights", "export", "safetensors", f"{out}/weights", f"checkpoint={run}"],
        "status": ["vdtrain", "status", str(run)],
        "requeue": ["python", "-m", "vdtrain.run.restarts", str(run)],
    }


def typed(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    program, rest = ("vdtrain", words[1:]) if words[0] == "vdtrain" else (words[2], words[3:])
    capsys.readouterr()
    status = MAINS[program](rest)
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    return status, said.out, said.err


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """An index whose checksum is right, with another content."""
    content = json.loads(path.read_text())["checkpoint"]
    content = change(content) or content
    path.write_text(json.dumps({"sha256": index_checksum(content), "checkpoint": content}))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def newer(path: Path) -> None:
    rewrite(path, lambda content: content.update(format=FORMAT + 1))


def newer_with_another_checksum(path: Path) -> None:
    path.write_text(json.dumps({"format": FORMAT + 1, "blake3": "0"}))


DEEP = b"[" * 100_000
ELSEWHERE = {"bytes": 0, "sha256": ""}
HARMS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00{"),
    "deep": lambda path: path.write_bytes(DEEP),
    "deep value": lambda path: path.write_bytes(b'{"sha256": "", "checkpoint": ' + DEEP + b"]" * len(DEEP) + b"}"),
    "digits": lambda path: path.write_bytes(b'{"checkpoint": {"step": ' + b"9" * 5000 + b"}}"),
    "list": lambda path: path.write_bytes(b"[]"),
    "text": lambda path: path.write_bytes(b'"step"'),
    "null": lambda path: path.write_bytes(b'{"sha256": null, "checkpoint": null}'),
    "folder": folder_instead,
    "pipe": pipe_instead,
    "content is a list": lambda path: rewrite(path, lambda _: [1]),
    "no format": lambda path: rewrite(path, lambda content: content.pop("format") and None),
    "no step": lambda path: rewrite(path, lambda content: content.pop("step") and None),
    "step is text": lambda path: rewrite(path, lambda content: content.update(step="5")),
    "step is true": lambda path: rewrite(path, lambda content: content.update(step=True)),
    "files is a list": lambda path: rewrite(path, lambda content: content.update(files=[1])),
    "file elsewhere": lambda path: rewrite(path, lambda c: c["files"].update({"/dev/zero": ELSEWHERE})),
    "record is text": lambda path: rewrite(path, lambda content: content["files"].update(a="b")),
    "a million processes": lambda path: rewrite(path, lambda content: content.update(world_size=10**6)),
    "groups is text": lambda path: rewrite(path, lambda content: content.update(groups="all")),
    "trainer is text": lambda path: rewrite(path, lambda content: content.update(trainer="state")),
}


QUICK_HARMS = ("empty", "deep", "pipe", "file elsewhere", "a million processes", "trainer is text")


@pytest.mark.parametrize("harm", with_slow(HARMS, QUICK_HARMS))
def test_a_damaged_index_is_passed_over_and_if_all_are_nothing_begins_anew(
    tiny_runs: TinyRuns, run: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], object], caplog: Any
) -> None:
    newest, before = candidates(run / CHECKPOINTS)
    harm(newest / INDEX_FILE)
    words = commands(tiny_runs, run)
    status, said, _ = typed(words["status"], capsys)
    assert status == 0
    # What the index does not show by its sizes, only a reader of the weights notices.
    if f"step {BEFORE}," in said:
        assert re.search(r"^damaged +\S*step-000000005", said, re.MULTILINE)
    assert typed(words["export"], capsys)[0] == 0
    assert "step-000000005 is passed over" in caplog.text
    shutil.rmtree(run.parent / "out")
    harm(before / INDEX_FILE)
    files = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    # All readers of weights share what they call.
    for name in ("train", "export", *(("sample", "evaluate") if harm is folder_instead else ())):
        status, _, said = typed(words[name], capsys)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (status, len(lines)) == (2, 1), (name, said)
        assert "step-000000005" in lines[0]
        assert "begin anew" in lines[0] or name != "train"
    assert typed(words["status"], capsys)[0] == 0
    assert typed(words["requeue"], capsys)[0] == 3
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == files
    assert len(candidates(run / CHECKPOINTS)) == 2


@pytest.mark.parametrize("harm", [newer, newer_with_another_checksum])
def test_a_newer_format_is_never_passed_over(
    tiny_runs: TinyRuns, run: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    newest = candidates(run / CHECKPOINTS)[0]
    harm(newest / INDEX_FILE)
    words = commands(tiny_runs, run)
    after = [f"stage={STAGES[1]}", f"stage.init_from={run}", f"run_dir={run.parent}/next"]
    words["next stage"] = [*words["train"], *after]
    for name in ("train", "next stage", "sample", "evaluate", "export"):
        status, _, said = typed(words[name], capsys)
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status in (1, 2)
        assert f"checkpoint format {FORMAT + 1}, and this version of vdtrain reads format {FORMAT}" in line
        assert f"or move {newest} away to go on from an older one" in line
    assert "begin anew in another run_dir" in typed(words["train"], capsys)[2]
    assert f"format {FORMAT + 1}" in typed(words["status"], capsys)[1]
    # The remedy.
    newest.rename(run / "elsewhere")
    assert typed(words["export"], capsys)[0] == 0


def test_a_checkpoint_under_another_steps_name_does_not_count_as_that_step(
    tiny_runs: TinyRuns, run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    copy = run / CHECKPOINTS / "step-000000009"
    shutil.copytree(run / CHECKPOINTS / f"step-00000000{BEFORE}", copy)
    (run / CHECKPOINTS / LATEST_FILE).write_text(f"{copy.name}\n")
    words = commands(tiny_runs, run)
    assert f"{copy}: holds the checkpoint of step {BEFORE}; rename it" in typed(words["status"], capsys)[1]
    assert typed(words["train"], capsys)[0] == 0
    assert "step-000000009 is passed over" in caplog.text
    # Whoever names it, means it.
    shutil.rmtree(run / CHECKPOINTS / "step-000000005")
    assert typed([*words["export"][:-1], f"checkpoint={copy}"], capsys)[0] == 0


LATEST_HARMS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "deep": lambda path: path.write_bytes(DEEP),
    "path": lambda path: path.write_bytes(b"../../step-000000004\n"),
    "digits": lambda path: path.write_bytes(b"step-" + b"9" * 5000),
    "folder": folder_instead,
    "pipe": pipe_instead,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("harm", with_slow(LATEST_HARMS, ("path", "pipe", "gone")))
def test_a_damaged_pointer_leaves_the_newest(
    tiny_runs: TinyRuns, run: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], object]
) -> None:
    harm(run / CHECKPOINTS / LATEST_FILE)
    words = commands(tiny_runs, run)
    assert f"step {STEPS}," in typed(words["status"], capsys)[1]
    assert typed(words["train"], capsys)[0] == 0
    assert typed(words["export"], capsys)[0] == 0


def test_a_pointer_to_what_is_gone_is_said(
    tiny_runs: TinyRuns, run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(run / CHECKPOINTS / "step-000000005")
    assert typed(commands(tiny_runs, run)["export"], capsys)[0] == 0
    assert "step-000000005 is passed over: latest names it, and it is not there" in caplog.text


FIGURE = b'{"step": 5, "loss": {}, '
RECORD_HARMS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00\n"),
    "deep": lambda path: path.write_bytes(DEEP + b"\n"),
    "digits": lambda path: path.write_bytes(b'{"step": ' + b"9" * 5000 + b', "loss": {}}\n'),
    "shape": lambda path: path.write_bytes(b'[1]\n"a"\nnull\n{"step": true, "loss": {}}\n{"step": 1, "loss": 3}\n'),
    "no samples": lambda path: path.write_bytes(b'{"step": 0, "loss": {}}\n{"step": 5, "loss": {}}\n'),
    "text": lambda path: path.write_bytes(FIGURE + b'"samples": "x", "skipped": [1], "time": {}}\n'),
    "not finite": lambda path: path.write_bytes(FIGURE + b'"time": NaN, "pairs_per_second": Infinity}\n'),
    "event": lambda path: path.write_bytes(b'{"kind": "start", "step": "x", "hosts": 3, "time": NaN}\n'),
    "pipe": pipe_instead,
    "folder": folder_instead,
}


@pytest.mark.parametrize("name", [METRICS_FILE, RECORD_FILE, SAVED_FILE])
@pytest.mark.parametrize("harm", RECORD_HARMS.values(), ids=RECORD_HARMS.keys())
def test_damaged_records_hide_nothing_else(
    tiny_runs: TinyRuns, run: Path, capsys: pytest.CaptureFixture[str], name: str, harm: Callable[[Path], object]
) -> None:
    harm(run / name)
    words = commands(tiny_runs, run)
    status, said, errors = typed(words["status"], capsys)
    assert status == 0 or errors.startswith("error: ")
    assert status or f"step {STEPS}," in said
    assert typed(words["requeue"], capsys)[0] == 3


@pytest.mark.parametrize("name", [METRICS_FILE, RECORD_FILE, SAVED_FILE])
@pytest.mark.parametrize("harm", with_slow(RECORD_HARMS, ("deep", "pipe")))
def test_a_complete_run_is_complete_beside_damaged_records(
    tiny_runs: TinyRuns, run: Path, capsys: pytest.CaptureFixture[str], name: str, harm: Callable[[Path], object]
) -> None:
    harm(run / name)
    assert typed(commands(tiny_runs, run)["train"], capsys)[0] == 0


def test_an_unfinished_run_goes_on_beside_damaged_figures(
    tiny_runs: TinyRuns, run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The run is taken up from the checkpoint before its last, and the damaged one is replaced."""
    path = run / METRICS_FILE
    path.write_bytes(path.read_bytes() + DEEP + b"\n\xff\n")
    index = run / CHECKPOINTS / "step-000000005" / INDEX_FILE
    index.write_bytes(b"")
    words = commands(tiny_runs, run)
    # A start that fails cuts nothing.
    before = path.read_bytes()
    assert typed([*words["train"], f"data.manifest={run}/nowhere"], capsys)[0] != 0
    assert path.read_bytes() == before
    status, _, said = typed(words["train"], capsys)
    assert status == 0, said
    assert "step-000000005 is passed over" in caplog.text
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert [each.name for each in candidates(run / CHECKPOINTS)] == ["step-000000005", "step-000000004"]
    assert index.stat().st_size
