"""Recorded passes change neither losses nor gradients nor a run.

No CUDA graph can be recorded on a CPU: a tape with the same rules about memory stands for it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tape import MemoryTape
from tests.models.test_activation_checkpointing import four_flows, make_diffuser
from tests.pairs import write_pairs
from tests.settings import TINY, phases
from tests.training.read_back import read_weights
from tests.world import last_words
from vdtrain.checkpoint.folder import CHECKPOINTS
from vdtrain.commands.train import main as train
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import check_settings
from vdtrain.models.diffuser import Context, Diffuser, DiffuserInput
from vdtrain.models.execution import CudaTape, Pass, Recorded, forget_passes, plain_passes, record_passes
from vdtrain.planning.memory import plan_stage
from vdtrain.run import distributed
from vdtrain.tracking.metrics import read_metrics
from vdtrain.tracking.speed import OperatorCount
from vdtrain.training import build
from vdtrain.training.build import build_trainer
from vdtrain.training.start import resolve_start

BATCH = 4
SMALL = (
    *TINY,
    "stage=stage3_four_flow",
    "stage.init_from=null",
    f"stage.global_batch_size={BATCH}",
    "hardware.micro_batch_size={32:2,64:2}",
    "log_every_steps=1",
    phases(BATCH, (32, 2), (64, 2)),
)


def batches(number: int) -> list[DiffuserInput]:
    """The inputs of four flows, each batch with other values."""
    return [
        DiffuserInput(
            each.output,
            each.latents + number,
            each.timesteps + number,
            [type(c)(c.modality, c.tokens * (1 + number)) for c in each.contexts],
        )
        for each in four_flows()
    ]


def gradients(diffuser: Diffuser, inputs: list[DiffuserInput]) -> tuple[Tensor, dict[str, Tensor]]:
    diffuser.zero_grad()
    loss = torch.stack([predicted.square().mean() for predicted in diffuser(inputs)]).sum()
    loss.backward()
    return loss.detach(), {
        name: each.grad.clone() for name, each in diffuser.named_parameters() if each.grad is not None
    }


def test_replays_give_the_same_bits() -> None:
    plain, diffuser = make_diffuser(), make_diffuser()
    record_passes(diffuser, MemoryTape)
    assert list(diffuser.state_dict()) == list(plain.state_dict())
    for number in range(3):
        expected, found = gradients(plain, batches(number)), gradients(diffuser, batches(number))
        assert torch.equal(expected[0], found[0])
        assert expected[1].keys() == found[1].keys()
        assert all(torch.equal(each, found[1][name]) for name, each in expected[1].items())
    assert (MemoryTape.recorded, MemoryTape.replayed) == (2, 6)


def test_other_forms_and_passes_without_gradients_are_plain() -> None:
    plain, diffuser = make_diffuser(), make_diffuser()
    record_passes(diffuser, MemoryTape)
    with torch.no_grad():
        diffuser(batches(0))
    assert MemoryTape.recorded == 0
    gradients(diffuser, batches(0))
    one_flow = [
        DiffuserInput(each.output, each.latents[:3], each.timesteps[:3], each.contexts[:1]) for each in batches(1)
    ]
    assert torch.equal(gradients(diffuser, one_flow)[0], gradients(plain, one_flow)[0])
    gradients(diffuser, batches(0))
    assert (MemoryTape.recorded, MemoryTape.replayed) == (2, 4)
    # A new phase has another form.
    forget_passes(diffuser)
    assert torch.equal(gradients(diffuser, one_flow)[0], gradients(plain, one_flow)[0])
    assert (MemoryTape.recorded, MemoryTape.replayed) == (4, 6)


@pytest.mark.parametrize("other", ["rows", "modalities"])
def test_a_form_is_both_the_sizes_and_the_modalities(other: str) -> None:
    """A replay would spread a single row over all, or send one modality through the layers of another."""
    plain, diffuser = make_diffuser(), make_diffuser()
    record_passes(diffuser, MemoryTape)

    def inputs(rows: int, modality: str) -> list[DiffuserInput]:
        (first, *_) = four_flows()
        tokens = first.contexts[0].tokens[:rows]
        return [DiffuserInput(first.output, first.latents[:rows], first.timesteps[:rows], [Context(modality, tokens)])]

    gradients(diffuser, inputs(2, "image"))
    changed = inputs(1, "image") if other == "rows" else inputs(2, "text")
    expected, found = gradients(plain, changed), gradients(diffuser, changed)
    assert torch.equal(expected[0], found[0])
    assert all(torch.equal(each, found[1][name]) for name, each in expected[1].items())


def test_passes_that_cannot_be_recorded_are_refused_in_one_line() -> None:
    class Refusing(MemoryTape):
        def record(self, function: Pass) -> Recorded:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    diffuser = make_diffuser()
    record_passes(diffuser, Refusing)
    with pytest.raises(ConfigError, match=r"hardware\.cuda_graphs=true: .* when stream is capturing") as refused:
        gradients(diffuser, batches(0))
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith("; choose false")


def test_the_first_error_of_a_capture_is_told_and_not_that_of_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Capture:
        """As `torch.cuda.graph` ends after an error: by another one."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def pass_() -> list[Tensor | None]:
        raise error

    for name in ("Stream", "graph_pool_handle", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    for error in (RuntimeError("a layer waits for the device"), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(RuntimeError) as raised:
            CudaTape().record(pass_)
        assert raised.value is error


def test_a_forgotten_recording_leaves_no_memory() -> None:
    """Without the garbage collector: the next phase's recording needs the memory at once."""

    class Graphs(MemoryTape):
        """Like a CUDA graph, it keeps what the function computed and not the function."""

        def record(self, function: Pass) -> Recorded:
            return [None if each is None else each.detach() for each in function()], int

    diffuser = make_diffuser()
    record_passes(diffuser, Graphs)
    gc.disable()
    try:
        gradients(diffuser, batches(0))
        kept = weakref.ref(vars(diffuser)["forward"]._recording)
        assert kept() is not None
        forget_passes(diffuser)
        assert kept() is None
    finally:
        gc.enable()


def test_operations_can_be_seen_where_nothing_is_replayed() -> None:
    diffuser = make_diffuser()
    record_passes(diffuser, MemoryTape)
    gradients(diffuser, batches(0))
    with plain_passes(diffuser), OperatorCount() as count:
        gradients(diffuser, batches(0))
    assert count.flops > 0
    assert MemoryTape.replayed == 2
    gradients(diffuser, batches(0))
    assert (MemoryTape.recorded, MemoryTape.replayed) == (2, 4)


@pytest.fixture(autouse=True)
def fresh_tape() -> None:
    MemoryTape.recorded = MemoryTape.replayed = 0


@pytest.fixture
def place() -> Iterator[distributed.RankInfo]:
    yield distributed.start("cpu")
    distributed.finish()


def trained(folder: Path, place: distributed.RankInfo, *words: str) -> tuple[list[Any], dict[str, Tensor]]:
    """Losses of the steps and the last weights of a run of two phases, with two micro-batches a step."""
    document = compose(
        "train", [*SMALL, f"data.manifest={folder}/data/manifest", f"run_dir={folder}/run{len(words)}", *words]
    )
    config = to_object(document, TrainConfig)
    Path(config.run_dir).mkdir(parents=True)
    assert build_trainer(config, document, resolve_start(config, document), place).run()
    newest = max((Path(config.run_dir) / CHECKPOINTS).glob("step-*"))
    return [record["loss"] for record in read_metrics(Path(config.run_dir))], read_weights(newest)


@pytest.mark.parametrize("mode", ["learning_rate", "gradient"])
def test_a_run_is_the_same_to_the_bit(
    tmp_path: Path, place: distributed.RankInfo, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    write_pairs(tmp_path / "data")
    scales = f"stage.gradient_scale_mode={mode}"
    losses, weights = trained(tmp_path, place, scales)
    monkeypatch.setattr(build, "record_passes", lambda diffuser: record_passes(diffuser, MemoryTape))
    again, same = trained(tmp_path, place, scales, "hardware.cuda_graphs=true")
    assert again == losses
    assert all(torch.equal(each, same[name]) for name, each in weights.items())
    # Once a phase; two steps of two micro-batches in each, and one pass before them.
    assert (MemoryTape.recorded, MemoryTape.replayed) == (4, 2 * 2 * (2 * 2 + 1))


def settings_of(*words: str) -> TrainConfig:
    return to_object(
        compose("train", ["stage=stage3_four_flow", "hardware=h200", "hardware.cuda_graphs=true", *words]), TrainConfig
    )


@pytest.mark.parametrize(
    ("words", "gpus", "setting"),
    [
        (["hardware.device=cpu"], 1, "hardware.device=cpu"),
        ([], 8, "hardware.exchange=sharded"),
        (["hardware.zero_stage=2", "hardware.exchange=sharded"], 8, "hardware.zero_stage=1"),
    ],
)
def test_what_cannot_be_recorded_is_refused(words: list[str], gpus: int, setting: str) -> None:
    with pytest.raises(ConfigError, match=r"hardware\.cuda_graphs=true") as refused:
        check_settings(settings_of(*words), gpus)
    assert setting in str(refused.value)


def test_the_command_refuses_a_device_without_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "data")
    words = [*SMALL, f"data.manifest={tmp_path}/data/manifest", f"run_dir={tmp_path}/run", "hardware.cuda_graphs=true"]
    capsys.readouterr()
    assert train(words) == 2
    (line,) = last_words(capsys.readouterr().err)
    assert line == "error: hardware.cuda_graphs=true: hardware.device=cpu has no CUDA graphs; choose false"
    assert not (tmp_path / "run").exists()


def test_the_plan_knows_what_graphs_keep() -> None:
    check_settings(settings_of(), 1)
    check_settings(settings_of("hardware.exchange=sharded"), 8)
    (with_graphs, _), (plain, _) = (
        plan_stage(each, 8).phases
        for each in (
            settings_of("hardware.exchange=sharded"),
            settings_of("hardware.exchange=sharded", "hardware.cuda_graphs=false"),
        )
    )
    assert with_graphs.peak > plain.peak + 2 * 2.5e9
