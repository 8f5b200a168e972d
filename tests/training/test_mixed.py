"""Training on image-text and sound-text pairs together: each flow's loss is the mean over the pairs that have both."""

from __future__ import annotations

import io
import math
import os
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.index.index import index
from tests.data.test_mixed import picture, write_tar
from tests.settings import phases
from vdtrain.commands.train import main as train
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.data.loading import open_stream
from vdtrain.diffusion.objective import StepRandom
from vdtrain.flows import Flow
from vdtrain.run import distributed
from vdtrain.tracking.metrics import read_metrics
from vdtrain.training.build import build_trainer
from vdtrain.training.start import resolve_start
from vdtrain.training.trainer import Trainer
from vdtrain.training.validation import Validation, gathered

ROOT = Path(__file__).parents[2]
BATCH, STEPS, STOPPED = 16, 3, 1
# No pair has an image and a sound.
WITHOUT = {"image-to-sound", "sound-to-image"}


def read_wave(data: bytes) -> Tensor:
    with wave.open(io.BytesIO(data)) as file:
        return torch.frombuffer(bytearray(file.readframes(256)), dtype=torch.int16) / 32767


class Waves:
    """Reads WAV files as float32 [256]."""

    def __call__(self, data: bytes) -> Tensor:
        return read_wave(data)


def sound(periods: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(8000)
        written.writeframes((20000 * np.sin(np.arange(256) * periods * 2 * np.pi / 256)).astype(np.int16).tobytes())
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images and 24 sounds, each with a caption, in two sources."""
    folder = tmp_path_factory.mktemp("mixed")
    sets = {
        "drawn": {f"i{n}": {"png": picture(10 * n), "txt": f"shade {n}".encode()} for n in range(24)},
        "heard": {f"s{n}": {"wav": sound(n), "txt": f"tone {n}".encode()} for n in range(24)},
    }
    for name, samples in sets.items():
        write_tar(folder / name / "0.tar", samples)
        (folder / name / "0_stats.json").write_text('{"status_dict": {"success": 24}}')
    index({name: folder / name for name in sets}, folder / "manifest", members={"sound": ["wav"]})
    return folder


def settings(folder: Path, run: str, steps: int, *overrides: str) -> list[str]:
    return [
        f"hydra.searchpath=[{ROOT}/tests/third_modality/conf]",
        "model=tiny_with_sound",
        "data=shapes",
        "stage=stage4_nine_flow",
        "stage.init_from=null",
        "hardware=cpu",
        "tracking=none",
        "model.diffuser.channels=[32,32]",
        f"stage.global_batch_size={BATCH}",
        "hardware.micro_batch_size={32:4}",
        "optimizer.warmup_samples=0",
        "log_every_steps=1",
        # Of 16 pairs two have a sound, so that most micro-batches have none.
        "data.stream.weights={drawn: 7, heard: 1}",
        "+data.stream.members={sound: {_target_: tests.training.test_mixed.Waves}}",
        phases(BATCH, (32, steps)),
        f"data.manifest={folder}/manifest",
        f"runs_dir={folder}/runs",
        f"run_dir={folder}/runs/{run}",
        *overrides,
    ]


def make_trainer(arguments: list[str]) -> Trainer:
    document = compose("train", arguments)
    config = to_object(document, TrainConfig)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    place = distributed.RankInfo(distributed.rank(), 0, distributed.world_size(), torch.device("cpu"))
    return build_trainer(config, document, resolve_start(config, document), place)


def by_definition(trainer: Trainer) -> dict[str, float]:
    """Each flow's loss on the first global batch: the mean over the pairs that have both of its modalities."""
    config, objective = trainer.config, trainer.objective
    stream = open_stream(config, 0, rank=0, world_size=1)
    batch = next(iter(stream))
    stream.close()
    sums: dict[str, list[float]] = {}
    for row in range(BATCH):
        one = batch.cut(row, row + 1)
        here = {name for name in one.samples if len(one.rows[name])}
        rng = StepRandom(trainer._draw_seed, 0, BATCH, slice(row, row + 1), torch.device("cpu"))
        with torch.no_grad():
            encoded = objective.encode(one.samples, 32, rng, rows=one.rows)
            losses = objective.losses(trainer.engine.module, encoded, rng)
        for name, loss in losses.items():
            if {Flow.parse(name).output, Flow.parse(name).context} <= here:
                sums.setdefault(name, []).append(float(loss))
            else:
                assert float(loss) == 0
    return {name: math.fsum(each) / len(each) for name, each in sums.items()}


def alone(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """A run, the same in two starts, and the losses by their definition; on one process."""
    trainer = make_trainer(settings(folder, "whole", STEPS))
    expected = by_definition(trainer)
    trainer.config.validation.pairs = 30
    pairs = Validation(trainer.config, trainer.objective, 32, torch.device("cpu"))
    pairs.encode()
    found = pairs.losses(trainer.engine.module, lambda doing: None)
    counts = {flow: sum(flow in each for each in found.values()) for flow in trainer.flow_names}
    mean = np.mean([each["text-to-sound"] for each in found.values() if "text-to-sound" in each])
    assert trainer.run()
    for steps in (STOPPED, STEPS):
        assert make_trainer(settings(folder, "resumed", steps)).run()
    report({"expected": expected, "counts": counts, "means": gathered(found), "sound": float(mean)})


def together(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """The same run on several processes, most of whose micro-batches have no sound."""
    trainer = make_trainer(settings(folder, f"together-{distributed.world_size()}", STEPS))
    assert trainer.run()
    report({})


@pytest.fixture(scope="module")
def seen(run_on_ranks: Callable[..., Any], folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        answer: dict[str, Any] = run_on_ranks(alone, 1, folder, timeout=300.0)[0]
    return answer


def losses(folder: Path, run: str) -> list[dict[str, float]]:
    return [record["loss"] for record in read_metrics(folder / "runs" / run)]


def test_a_loss_is_the_mean_over_the_pairs_that_have_both_modalities(seen: dict[str, Any], folder: Path) -> None:
    logged = losses(folder, "whole")
    assert len(logged) == STEPS
    assert logged[0].keys() == seen["expected"].keys()
    assert len(logged[0]) == 9 - len(WITHOUT)
    for name, loss in seen["expected"].items():
        assert logged[0][name] == pytest.approx(loss, rel=1e-4), name


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_of_processes_changes_nothing(
    seen: dict[str, Any],
    run_on_ranks: Callable[..., Any],
    folder: Path,
    processes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    run_on_ranks(together, processes, folder, timeout=300.0)
    for one, several in zip(losses(folder, "whole"), losses(folder, f"together-{processes}"), strict=True):
        assert one == pytest.approx(several, rel=2e-3)


def test_a_stopped_run_goes_on_exactly(seen: dict[str, Any], folder: Path) -> None:
    assert losses(folder, "resumed") == losses(folder, "whole")


def test_validation_counts_the_pairs_that_a_flow_has(seen: dict[str, Any]) -> None:
    counts, means = seen["counts"], seen["means"]
    assert counts["text-to-text"] == 30
    assert counts["text-to-image"] + counts["text-to-sound"] == 30
    assert counts["text-to-sound"] == counts["sound-to-sound"] > 0
    assert means.keys() == counts.keys() - WITHOUT
    assert means["text-to-sound"]["loss"] == pytest.approx(seen["sound"])


def test_compiled_code_is_refused_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(settings(folder, "compiled", 1, "hardware.compile=blocks")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "hardware.compile=blocks: compiled code needs batches of one shape" in lines[-1]
