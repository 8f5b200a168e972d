"""The trainer on the tiny preset: the same step on any number of ranks, an unbroken curriculum, exact resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import settings
from tests.programs import program
from tests.training.read_back import read_trainer_state, read_weights
from tests.training.toy import gather
from vdtrain.commands.sample import main as sample
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.diffusion.objective import Objective, StepRandom
from vdtrain.flows import Flow
from vdtrain.models.diffuser import Diffuser, layer_group
from vdtrain.run import distributed
from vdtrain.tracking.metrics import read_metrics
from vdtrain.training.build import build_trainer
from vdtrain.training.start import resolve_start
from vdtrain.training.trainer import Trainer

STAGES = ("stage1_single_flow", "stage2_dual_flow", "stage3_four_flow")
WAYS = {"sharded": "exchange=sharded", "deepspeed": "exchange=deepspeed", "zero2": "zero_stage=2"}
QUICK_WAYS, SLOW_WAYS = ("sharded", "deepspeed"), ("zero2",)
BATCH, STEPS = 8, 3
# Sums of float32 in another order differ by some 1e-7, on any processor: of a group's gradient, 4e-7 was the most seen.
GRADIENT_BOUND = 1e-6
# The same of a group's movement, and the rounding of each weight: 1e-8, where the global layers move by 5e-5.
MOVEMENT_BOUND = 1e-4
MINIATURE = [
    *settings.TINY,
    f"stage.global_batch_size={BATCH}",
    "hardware.micro_batch_size={32:4,64:2}",
    "optimizer.warmup_samples=0",
    # Large enough that the clipped and the unclipped gradient differ.
    "optimizer.gradient_clip=0.5",
    "log_every_steps=1",
]


def phases(low: int, high: int) -> str:
    return settings.phases(BATCH, (32, low), (64, high))


def make_trainer(folder: Path, stage: str, *overrides: str) -> Trainer:
    common = [*MINIATURE, f"stage={stage}", f"data.manifest={folder}/data/manifest", f"runs_dir={folder}/runs"]
    document = compose("train", [*common, *overrides])
    config = to_object(document, TrainConfig)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    place = distributed.RankInfo(distributed.rank(), distributed.rank(), distributed.world_size(), torch.device("cpu"))
    return build_trainer(config, document, resolve_start(config, document), place)


def newest(folder: Path, run: str) -> Path:
    return max((folder / "runs" / run / "checkpoints").glob("step-*"))


def losses(folder: Path, run: str) -> list[dict[str, float]]:
    return [record["loss"] for record in read_metrics(folder / "runs" / run)]


# What each group of ranks does; every function runs in processes of its own.


def on_one_rank(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """Starting a process costs seconds, so that one run serves several tests."""
    four_flow_steps(folder, QUICK_WAYS)
    carried_along(folder)
    report({"warnings": resumed_on_other_shards(folder)})


def on_two_ranks(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    four_flow_steps(folder, QUICK_WAYS)
    report({"stages": curriculum(folder)})


def in_other_ways(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    four_flow_steps(folder, SLOW_WAYS)
    report({})


def four_flow_steps(folder: Path, ways: Sequence[str]) -> None:
    """Three four-flow steps from random weights under these ways; two micro-batches a step on two ranks."""
    for way in ways:
        name = f"four-{distributed.world_size()}-{way}"
        overrides = [f"hardware.{WAYS[way]}", "stage.init_from=null", phases(STEPS, 0)]
        # Adam divides a gradient by its size, and with it the gradient's rounding, which differs between processors.
        # An epsilon far above every gradient takes that division out.
        overrides += ["optimizer.epsilon=1", "optimizer.learning_rate_scale=1e5"]
        overrides += ["hardware.micro_batch_size={32:2,64:2}"] if distributed.world_size() == 2 else []
        trainer = make_trainer(folder, STAGES[2], f"run_dir={folder}/runs/{name}", *overrides)
        record_gradients(trainer, folder / name)
        assert trainer.run()


def record_gradients(trainer: Trainer, folder: Path) -> None:
    """Write the reduced gradient of every layer group and step, before it is clipped."""
    optimizer, partitions = trainer.engine._optimizer, trainer.engine.partitions()
    layouts, update = [part.layout for part in partitions], optimizer.update
    folder.mkdir(exist_ok=True)

    def recording(gradients: Sequence[torch.Tensor], *arguments: Any) -> None:
        own = [
            gradient[trainer.engine._strategy.local_slice(part.start, part.stop)]
            for gradient, part in zip(gradients, partitions, strict=True)
        ]
        whole = gather(own, layouts)
        if distributed.rank() == 0:
            save_file(whole, folder / f"{max(optimizer.counts)}.safetensors")
        update(gradients, *arguments)

    optimizer.update = recording  # type: ignore[method-assign]


def curriculum(folder: Path) -> list[dict[str, Any]]:
    """The three stages in turn; the loss of every earlier flow at a stage's end and at the next one's start."""
    seen: list[dict[str, Any]] = []
    for number, stage in enumerate(STAGES):
        if number:
            trainer = make_trainer(folder, stage, phases(2, 1))
            before = seen[-1]
            before["next_start"] = [fixed_loss(trainer, name, resolution) for name, resolution in before["flows"]]
            trainer.close()
        trainer = make_trainer(folder, stage, phases(2, 1))
        assert trainer.run()
        flows = [(name, resolution) for name in trainer.flow_names for resolution in (32, 64)]
        seen.append({"flows": flows, "end": [fixed_loss(trainer, name, resolution) for name, resolution in flows]})
    return seen


def fixed_loss(trainer: Trainer, name: str, resolution: int) -> str:
    """Loss of one flow on a fixed batch with fixed noise, timesteps and dropout, to the last bit."""
    objective = Objective(
        [Flow.parse(name)], trainer.objective.schedule, trainer.objective.frozen, trainer.config.objective
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (BATCH, 3, resolution, resolution), generator=generator, dtype=torch.uint8)
    samples = {"image": images, "text": [f"a red circle number {index}" for index in range(BATCH)]}
    rng = StepRandom("fixed", 0, BATCH, slice(0, BATCH), torch.device("cpu"))
    with torch.no_grad():
        encoded = objective.encode(samples, resolution, rng)
        return float(objective.losses(trainer.engine.module, encoded, rng)[name]).hex()


def carried_along(folder: Path) -> None:
    """A stage of one flow that starts from four, is resumed, and hands on what it did not train."""
    whole = newest(folder, "four-1-sharded")
    overrides = [f"run_dir={folder}/runs/carrying", f"stage.init_from={whole}"]
    assert make_trainer(folder, STAGES[0], *overrides, phases(1, 0)).run()
    assert make_trainer(folder, STAGES[0], *overrides, phases(2, 0)).run()


def resumed_on_other_shards(folder: Path) -> list[list[str]]:
    """What a run says that goes on with the shards of before, and then with others."""
    warnings: list[list[str]] = []
    for steps, data in ((3, "data"), (4, "other")):
        overrides = [f"run_dir={folder}/runs/carrying", f"data.manifest={folder}/{data}/manifest"]
        trainer = make_trainer(folder, STAGES[0], *overrides, phases(steps, 0))
        lines: list[str] = []
        trainer.reporter.warn = lines.append  # type: ignore[method-assign]
        assert trainer.run()
        warnings.append(lines)
    return warnings


def stopped_and_resumed(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """A run of two phases, once without a break and once stopped twice by a signal that only the last rank receives."""
    overrides = ["stage.init_from=null", phases(4, 3), "checkpoint.every_steps=100"]
    assert make_trainer(folder, STAGES[2], f"run_dir={folder}/runs/whole", *overrides).run()
    ends: list[tuple[int, bool]] = []
    for stop_at in (2, 5, None):
        trainer = make_trainer(folder, STAGES[2], f"run_dir={folder}/runs/broken", *overrides)
        step = trainer.step

        def stopping(
            *arguments: Any, step: Any = step, trainer: Trainer = trainer, stop_at: int | None = stop_at
        ) -> Any:
            if trainer.state.step == stop_at and distributed.rank() == distributed.world_size() - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return step(*arguments)

        trainer.step = stopping  # type: ignore[method-assign]
        complete = trainer.run()
        ends.append((trainer.state.step, complete))
    report({"ends": ends})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.pairs import write_pairs

    folder = tmp_path_factory.mktemp("trainer")
    write_pairs(folder / "data")
    write_pairs(folder / "other", shards=1)
    return folder


@pytest.fixture(scope="module")
def runs(run_on_ranks: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """Everything that is trained, and what the ranks saw of it."""
    (alone,) = run_on_ranks(on_one_rank, 1, folder, timeout=600.0)
    return {**alone, **run_on_ranks(on_two_ranks, 2, folder, timeout=600.0)[0]}


@pytest.fixture(scope="module")
def other_runs(run_on_ranks: Callable[..., Any], folder: Path) -> None:
    for ranks in (1, 2):
        run_on_ranks(in_other_ways, ranks, folder, timeout=600.0)


@pytest.mark.parametrize("way", QUICK_WAYS)
def test_a_step_on_two_ranks_equals_the_step_on_one(runs: dict[str, Any], folder: Path, way: str) -> None:
    compare_ranks(folder, way)


@pytest.mark.slow
@pytest.mark.usefixtures("other_runs")
@pytest.mark.parametrize("way", SLOW_WAYS)
def test_a_step_on_two_ranks_equals_the_step_on_one_in_other_ways(folder: Path, way: str) -> None:
    compare_ranks(folder, way)


def compare_ranks(folder: Path, way: str) -> None:
    names = [f"four-{ranks}-{way}" for ranks in (1, 2)]
    for step in range(STEPS):
        one, two = (load_file(folder / name / f"{step}.safetensors") for name in names)
        for group, (error, size) in norms_by_group(one, two).items():
            assert error <= GRADIENT_BOUND * size, (step, group)
    weights = [read_weights(newest(folder, name), "model") for name in names]
    start = Diffuser(to_object(compose("train", MINIATURE), TrainConfig).model, {layer_group(n) for n in weights[0]})
    moved = [{name: each[name] - before for name, before in start.state_dict().items()} for each in weights]
    for group, (error, size) in norms_by_group(*moved).items():
        assert size > 0
        assert error <= MOVEMENT_BOUND * size, group
    logged = [losses(folder, name) for name in names]
    assert len(logged[0]) == len(logged[1]) == STEPS
    for first, second in zip(*logged, strict=True):
        assert first == pytest.approx(second, rel=GRADIENT_BOUND)


def norms_by_group(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """By layer group: the norm of the difference of two sets of tensors, and the norm of the first."""
    assert one.keys() == two.keys()
    squares: dict[str, list[float]] = {}
    for name, tensor in one.items():
        sums = squares.setdefault(layer_group(name), [0.0, 0.0])
        sums[0] += float((two[name].double() - tensor.double()).square().sum())
        sums[1] += float(tensor.double().square().sum())
    return {group: (error**0.5, size**0.5) for group, (error, size) in squares.items()}


def test_every_group_moved(runs: dict[str, Any], folder: Path) -> None:
    """The comparison above would hold for weights that never changed."""
    weights = read_weights(newest(folder, "four-2-sharded"), "model")
    # Every residual branch ends in a layer that starts at zero.
    for ending in ("out_layers.3.weight", "proj_out.weight"):
        moved = {layer_group(name) for name, tensor in weights.items() if name.endswith(ending) and tensor.any()}
        assert len(moved) == 2


def test_layers_that_a_stage_does_not_train_are_handed_on(runs: dict[str, Any], folder: Path) -> None:
    before, after = (read_weights(newest(folder, run), "model") for run in ("four-1-sharded", "carrying"))
    assert before.keys() == after.keys()
    changed = {layer_group(name) for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {"global", "data.image", "context.image"}


def test_a_run_that_goes_on_with_other_shards_says_so(runs: dict[str, Any]) -> None:
    same, (warning,) = runs["warnings"]
    assert same == []
    assert "its shards have changed since the checkpoint" in warning


def test_losses_are_unbroken_from_stage_to_stage(runs: dict[str, Any]) -> None:
    stages = runs["stages"]
    for before in stages[:-1]:
        assert before["flows"]
        assert before["next_start"] == before["end"]
    # The fixed loss is one that training changes.
    assert stages[0]["end"] != stages[1]["end"][: len(stages[0]["end"])]


@pytest.mark.slow
def test_stopped_runs_go_on_exactly(run_on_ranks: Callable[..., Any], folder: Path) -> None:
    """Whose last rank alone is told; test_resume has the ranks of a run that is started again."""
    ends = run_on_ranks(stopped_and_resumed, 2, folder, timeout=600.0)[0]["ends"]
    assert [complete for _, complete in ends] == [False, False, True]
    assert ends[0][0] < ends[1][0] < ends[2][0] == 7
    assert losses(folder, "broken") == losses(folder, "whole")
    whole, broken = (newest(folder, name) for name in ("whole", "broken"))
    for kind in ("model", "ema"):
        expected, found = read_weights(whole, kind), read_weights(broken, kind)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_trainer_state(whole)["state"] == read_trainer_state(broken)["state"]


@pytest.mark.parametrize(
    ("flow", "inputs", "expected"),
    [
        ("text-to-image", "[a red circle,a blue star]", ["0000.png", "0001.png"]),
        ("image-to-text", "[{image},{image}]", ["captions.json", "captions.txt"]),
    ],
)
def test_a_trained_checkpoint_samples(
    runs: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flow: str,
    inputs: str,
    expected: list[str],
) -> None:
    image = tmp_path / "given.png"
    Image.new("RGB", (90, 70), (200, 30, 30)).save(image)
    arguments = [f"checkpoint={folder}/runs/four-1-sharded", f"flow={flow}", f"inputs={inputs.format(image=image)}"]
    arguments += ["resolution=32", "steps=2", "seed=3", f"output_dir={tmp_path}/out"]
    assert sample([*arguments, "weights=ema"]) == 0
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert written == expected
    if flow == "text-to-image":
        with Image.open(tmp_path / "out" / "0000.png") as made:
            assert made.size == (32, 32)
            assert json.loads(made.info["vdtrain"])["flow"] == flow
    else:
        assert len((tmp_path / "out" / "captions.txt").read_text().splitlines()) == 2
    capsys.readouterr()
    assert sample([*arguments, "flow=text-to-sound"]) == 2
    assert sample([*arguments, f"checkpoint={folder}/nowhere"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "flow=text-to-sound" in errors[0]
    assert f"checkpoint={folder}/nowhere: does not exist" in errors[1]


@pytest.mark.slow
def test_the_demos_report_is_made_of_the_three_stages(runs: dict[str, Any], folder: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "demo_report.py"
    command = [program("python"), str(script), str(folder / "runs"), "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "runs" / "report.json").read_text())
    flows = {"image-to-image", "text-to-image", "image-to-text", "text-to-text"}
    assert result["losses"].keys() == result["accuracy"]["seen"].keys() == flows
    assert all(name in done.stdout for name in (*flows, "chance", "12.5%", "20.0%"))
    for name in ("losses.png", "samples.png"):
        with Image.open(folder / "runs" / name) as image:
            assert min(image.size) > 300


def test_a_run_folder_is_not_continued_with_another_model(runs: dict[str, Any], folder: Path) -> None:
    overrides = [f"run_dir={folder}/runs/four-1-sharded", "stage.init_from=null", "seed=1"]
    document = compose("train", [*MINIATURE, f"stage={STAGES[2]}", phases(STEPS, 0), *overrides])
    with pytest.raises(ConfigError, match=r"seed=1: run_dir=.* has 0; restore it"):
        resolve_start(to_object(document, TrainConfig), document)
