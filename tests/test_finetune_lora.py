"""The example that teaches the demo's model new pairs of colour and shape by adapters."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from subprocess import run

import pytest
from PIL import Image

from tests.tiny_runs import ROOT, TinyRuns


@pytest.mark.slow
def test_the_example_trains_exports_and_measures(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(tiny_runs.folder / "runs", runs)
    words = [sys.executable, str(ROOT / "examples" / "finetune_lora.py"), str(runs), "8", "32"]
    words += ["stage.global_batch_size=16", "optimizer.warmup_samples=16"]
    ended = run(words, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((runs / "lora" / "report.json").read_text())
    assert report["base"] == "stage2_dual_flow"
    assert report["parameters"]["share"] < 0.1
    for when in ("before", "after"):
        for pairs in ("new_pairs", "other_pairs"):
            assert set(report["accuracy"][when][pairs]) == {"image-to-image", "text-to-image"}
    assert Image.open(runs / "lora" / "samples.png").size[0] > 1000
    assert (runs / "lora" / "exported" / "weights.json").is_file()
