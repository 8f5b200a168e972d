"""Compiled blocks and channels last change neither losses nor gradients, and the training command uses them."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.models.test_activation_checkpointing import MODALITIES, make_diffuser, step
from tests.settings import phases
from tests.tiny_runs import BATCH, STAGES, TinyRuns
from vdtrain.checkpoint.folder import CHECKPOINTS, candidates
from vdtrain.checkpoint.format import Checkpoint
from vdtrain.commands.train import main as train
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.engine.adamw import FlatAdamW
from vdtrain.models.execution import blocks, checkpoint_activations, compile_training
from vdtrain.models.frozen import FrozenParts, build_frozen
from vdtrain.tracking.metrics import read_metrics

# Compiled code sums in another order. Measured: 4e-7 by blocks, 4e-6 with channels last.
TOLERANCE = 1e-5
SHAPES_OF_BLOCKS = 16
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed, for Inductor's CPU code")
# Loss, gradients, bytes kept.
Step = tuple[Tensor, dict[str, Tensor], int]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def assert_equal_steps(one: Step, other: Step) -> None:
    assert float(other[0]) == pytest.approx(float(one[0]), rel=TOLERANCE)
    for name, gradient in one[1].items():
        assert float((other[1][name] - gradient).norm()) <= TOLERANCE * float(gradient.norm()), name


def test_equal_blocks_share_code_and_compute_what_plain_ones_do() -> None:
    plain, diffuser = make_diffuser(), make_diffuser()
    names = list(diffuser.state_dict())
    checkpoint_activations(diffuser, "context")
    compile_training(diffuser, FrozenParts({}), "blocks", "aot_eager")
    assert_equal_steps(step(plain), step(diffuser))
    assert counters["stats"]["unique_graphs"] == SHAPES_OF_BLOCKS
    assert not counters["graph_break"]
    assert list(diffuser.state_dict()) == names
    step(diffuser)
    assert counters["stats"]["unique_graphs"] == SHAPES_OF_BLOCKS


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("mode", "checkpointing", "graphs"), [("blocks", "blocks", SHAPES_OF_BLOCKS), ("whole", "none", 1)]
)
def test_inductors_code_computes_what_plain_code_does(mode: str, checkpointing: str, graphs: int) -> None:
    plain, diffuser = step(make_diffuser()), make_diffuser()
    diffuser.channels_last = True
    checkpoint_activations(diffuser, checkpointing)
    compile_training(diffuser, FrozenParts({}), mode)
    assert_equal_steps(plain, step(diffuser))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_channels_last_reaches_every_image_layer() -> None:
    plain, diffuser = make_diffuser(), make_diffuser()
    diffuser.channels_last = True
    orders: list[bool] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # The state of texts is flat, or has a width of 1.
        if inputs[0].ndim == 4 and inputs[0].shape[-1] > 1:
            orders.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for block in blocks(diffuser.data_layers, diffuser.context_layers):
        block.register_forward_pre_hook(note)
    assert_equal_steps(step(plain), step(diffuser))
    images = [len(list(layers["image"].children())) for layers in (diffuser.data_layers, diffuser.context_layers)]
    assert orders == [True] * (images[0] + len(MODALITIES) * images[1])


def test_compiled_encoders_give_the_same_latents_and_contexts() -> None:
    model = to_object(compose("train", ["model=tiny"]), TrainConfig).model
    plain, compiled = build_frozen(model), build_frozen(model)
    compiled.to(memory_format=torch.channels_last)
    compile_training(make_diffuser(), compiled, "blocks", "aot_eager")
    generator = torch.Generator().manual_seed(0)
    samples = {
        "image": torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "text": ["a red circle", "two blue squares on white"],
    }
    expected, found = (parts.encode(samples, ["image", "text"], ["image", "text"]) for parts in (plain, compiled))
    assert counters["stats"]["unique_graphs"] >= 4
    for name in samples:
        torch.testing.assert_close(found.latents[name], expected.latents[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.contexts[name], expected.contexts[name], rtol=1e-4, atol=1e-5)


def losses(tiny_runs: TinyRuns, run: Path, *settings: str, stage: str = STAGES[2]) -> list[dict[str, float]]:
    """The losses of a command that trains a stage's flows, all four by default, for a step at each resolution."""
    size = phases(BATCH, (32, 1), (64, 1))
    own = [f"stage={stage}", *tiny_runs.overrides, size, "stage.init_from=null", f"run_dir={run}", *settings]
    assert train(own) == 0
    return [record["loss"] for record in read_metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[::2])
def test_the_warm_up_changes_nothing(
    tiny_runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    """With a compiler that changes no operator, every loss has the same bits."""
    compile_plainly = functools.partial(compile_training, backend="eager")
    monkeypatch.setattr("vdtrain.training.build.compile_training", compile_plainly)
    plain = losses(tiny_runs, tmp_path / "plain", stage=stage)
    assert losses(tiny_runs, tmp_path / "compiled", "hardware.compile=blocks", stage=stage) == plain
    printed = capsys.readouterr().out
    assert all(f"compiled for {pixels} pixels in" in printed for pixels in (32, 64))


@pytest.mark.slow
@needs_compiler
def test_a_compiled_stage_has_the_plain_ones_losses(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    plain = losses(tiny_runs, tmp_path / "plain")
    found = losses(tiny_runs, tmp_path / "compiled", "hardware.compile=blocks", "hardware.channels_last=true")
    for one, other in zip(plain, found, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def last_weights(run: Path, which: str = "model") -> dict[str, Tensor]:
    last = candidates(run / CHECKPOINTS)[0]
    return {key: tensor.clone() for key, tensor in Checkpoint.open(last).unchecked_weights(which).items()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The difference of two sets of weights, as a share of their norm."""
    first, second = (torch.cat([each.flatten() for _, each in sorted(weights.items())]) for weights in (one, other))
    return float((first - second).norm() / second.norm())


def without_the_last(run: Path, copy: Path) -> None:
    """Copy a run of four steps, as if it had been stopped after the second."""
    shutil.copytree(run, copy)
    last, middle = candidates(copy / CHECKPOINTS)
    assert (middle.name, last.name) == ("step-000000002", "step-000000004")
    shutil.rmtree(last)


# AdamW's first steps move a weight by the learning rate, whatever its gradient: rounding decides where it is near zero.
SMALL = 1e-5


@pytest.mark.slow
def test_a_compiled_run_goes_on_to_the_bit(
    tiny_runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled code's gradients have other bits than plain ones, so every step must run it."""
    compile_otherwise = functools.partial(compile_training, backend="aot_eager")
    monkeypatch.setattr("vdtrain.training.build.compile_training", compile_otherwise)
    settings = [*tiny_runs.overrides, phases(BATCH, (32, 4)), "stage.init_from=null", "hardware.compile=blocks"]

    def run(name: str) -> dict[str, Tensor]:
        assert train(["stage=stage1_single_flow", *settings, f"run_dir={tmp_path}/{name}"]) == 0
        return last_weights(tmp_path / name)

    whole = run("whole")
    without_the_last(tmp_path / "whole", tmp_path / "resumed")
    resumed = run("resumed")
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())
    assert all(record["tflops"] > 0 for record in read_metrics(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_goes_on_with_and_without_channels_last(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    """To the bit in the same order, within rounding in the other one, also on two processes under DeepSpeed."""
    settings = [*tiny_runs.overrides, phases(BATCH, (32, 4)), "stage.init_from=null"]

    def run(name: str, *own: str) -> dict[str, Tensor]:
        assert train(["stage=stage2_dual_flow", *settings, f"run_dir={tmp_path}/{name}", *own]) == 0
        return last_weights(tmp_path / name)

    orders = {"plain": "hardware.channels_last=false", "last": "hardware.channels_last=true"}
    whole = {name: run(name, word) for name, word in orders.items()}
    assert apart(whole["last"], whole["plain"]) < SMALL
    for first in orders:
        for second, word in orders.items():
            without_the_last(tmp_path / first, tmp_path / f"{first}-{second}")
            resumed = run(f"{first}-{second}", word)
            assert apart(resumed, whole[second]) <= (0.0 if first == second else SMALL)
    without_the_last(tmp_path / "last", tmp_path / "two")
    resumed = run("two", orders["last"], "gpus=2", "hardware.zero_stage=1")
    assert apart(resumed, whole["plain"]) < SMALL


@pytest.mark.slow
@needs_compiler
def test_a_compiled_update_trains_what_the_separate_passes_do(
    tiny_runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks stay as they are, so that only the update of the bf16 weights is compiled."""
    passes: list[int] = []

    def counted(optimizer: FlatAdamW, *given: Any) -> None:
        passes.append(len(given))
        update_fused(optimizer, *given)

    update_fused = FlatAdamW.update_fused
    monkeypatch.setattr(FlatAdamW, "update_fused", counted)
    compile_plainly = functools.partial(compile_training, backend="eager")
    monkeypatch.setattr("vdtrain.training.build.compile_training", compile_plainly)
    small = ["hardware.precision=bf16", f"optimizer.learning_rate_scale={SMALL}"]
    plain = losses(tiny_runs, tmp_path / "plain", *small)
    assert not passes
    found = losses(tiny_runs, tmp_path / "compiled", *small, "hardware.compile=blocks")
    for one, other in zip(plain, found, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    # Once before each phase, and in each step.
    assert len(passes) == 4
    for which in ("model", "ema"):
        assert apart(last_weights(tmp_path / "compiled", which), last_weights(tmp_path / "plain", which)) <= 1e-6
