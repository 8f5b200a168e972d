"""benchmarks/memory.py where there is no GPU: its prediction, against the same steps counted on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.planning.dry_run import DryRun, LiveMemory


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mode", ["none", "blocks"])
def test_prediction_is_what_the_steps_take(benchmark: ModuleType, mode: str) -> None:
    settings = ["model=tiny", "data=shapes", "hardware=cpu", "stage=stage3_four_flow"]
    config = to_object(compose("train", [*settings, f"hardware.activation_checkpointing={mode}"]), TrainConfig)
    dry_run = DryRun(config)
    predicted = benchmark.predicted(dry_run, 64, 8)
    assert predicted["at_most"] > 4 * predicted["weights"] > 0
    shapes = dry_run.encoded(64, 8)
    with LiveMemory() as memory:
        benchmark.train(config, shapes, 8, "cpu")
    assert predicted["at_most"] == pytest.approx(memory.peak, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_it_says_so(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "GPU" in shown.err
