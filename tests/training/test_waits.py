"""A training step gives a GPU its work without waiting for it, which a CPU can tell from the operators.

A step on the CPU meets every operator whose result the host would wait for. The same losses on PyTorch's "meta" device,
whose tensors have no values, also meet every copy between host and device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models.tiny import fresh
from tests.settings import TINY
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.data.batch import Batch
from vdtrain.diffusion import objective
from vdtrain.diffusion.schedule import Schedule
from vdtrain.models.diffuser import Diffuser
from vdtrain.run import distributed
from vdtrain.tracking.speed import StepClock
from vdtrain.training.build import build_trainer, layer_groups
from vdtrain.training.start import Start
from vdtrain.training.trainer import Trainer

ROWS = 4
# Operators whose result, or the shape of whose result, the host waits for.
READS = {
    f"aten::{name}"
    for name in ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "_unique2")
}
# Methods that read a tensor's memory without an operator.
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


class Waits(TorchDispatchMode):
    """`with Waits(...) as waits:` lists what the host would wait for.

    Args:
        device: where the step computes.
        pinned: addresses of pinned tensors; copies from other memory wait.
    """

    def __init__(self, device: str, pinned: Sequence[int] = ()) -> None:
        super().__init__()
        self.device, self.pinned = torch.device(device), set(pinned)
        self.found: list[str] = []
        self.copies = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        by_mask = name in ("aten::index", "aten::index_put_") and any(each.dtype == torch.bool for each in given[1:])
        # A tensor of Python numbers comes from memory that is not pinned.
        from_numbers = name == "aten::lift_fresh" and self.device.type != "cpu" and out.device == self.device
        if name in READS or by_mask or from_numbers:
            self.found.append(name)
        if name in ("aten::_to_copy", "aten::copy_"):
            target, source = (out, given[0]) if name == "aten::_to_copy" else given[:2]
            if target.device != source.device:
                self.copies += 1
                ahead = bool((kwargs or {}).get("non_blocking")) or (len(args) > 2 and bool(args[2]))
                if not ahead or source.untyped_storage().data_ptr() not in self.pinned:
                    self.found.append(f"{name} {source.device} -> {target.device}")
        return out


class Methods(TorchFunctionMode):
    """Adds calls of METHODS to the list of a `Waits`."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in METHODS:
            self.waits.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits_of(run: Callable[[], object], device: str, pinned: Sequence[int] = ()) -> Waits:
    """What a second run waits for; the first one makes what is kept, such as unconditional contexts."""
    run()
    waits = Waits(device, pinned)
    with Methods(waits), waits:
        run()
    return waits


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    overrides = (
        *TINY,
        "stage=stage3_four_flow",
        "stage.init_from=null",
        f"stage.global_batch_size={ROWS}",
        "hardware.micro_batch_size={32:2,64:2}",
        "objective.context_dropout=0.5",
        # Every step measures what only steps with a record do.
        "log_every_steps=1",
        f"runs_dir={tmp_path}",
    )
    document = compose("train", overrides)
    config = to_object(document, TrainConfig)
    Path(config.run_dir).mkdir(parents=True)
    place = distributed.start("cpu")
    made = build_trainer(config, document, Start(), place)
    yield made
    made.close()
    distributed.finish()


def batch_of(trainer: Trainer) -> Batch:
    _, images, captions = fresh(ROWS, 64)
    samples = trainer.objective.prepare({"image": images, "text": captions})
    return Batch(samples, torch.arange(ROWS))


def test_a_step_waits_for_no_result(trainer: Trainer) -> None:
    phase = replace(trainer.config.stage.phases[0], resolution=64)
    batch = batch_of(trainer)
    assert trainer.ema is not None
    assert waits_of(lambda: trainer.step(batch, phase, StepClock(trainer.place.device)), "cpu").found == []


def test_every_copy_to_the_device_is_sent_ahead_from_pinned_memory(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        pinned.append(copy.untyped_storage().data_ptr())
        return copy

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(Tensor, "pin_memory", pin)
        batch = batch_of(trainer)
    phase = replace(trainer.config.stage.phases[0], resolution=64)
    config, device = trainer.config, torch.device("meta")
    trainer.objective.frozen.to(device)
    trainer.objective.schedule = Schedule(config.model.schedule, device)
    trainer.place = replace(trainer.place, device=device)
    monkeypatch.setattr(objective, "generator_of", lambda *names, device: None)
    with device:
        diffuser = Diffuser(config.model, layer_groups(config, ()))

    def losses() -> None:
        trainer.objective.total(
            trainer._losses(diffuser, batch, slice(0, 2), ROWS, phase, StepClock(device))
        ).backward()

    waits = waits_of(losses, "meta", pinned)
    assert waits.found == []
    # Images, and the ids of the text VAE and of CLIP.
    assert waits.copies == 3
    assert all(parameter.grad is not None for parameter in diffuser.parameters())


def test_waits_are_noticed() -> None:
    numbers = torch.arange(3.0)
    waits = Waits("meta")
    with Methods(waits), waits:
        assert numbers.sum() > 0
        numbers[numbers > 1].tolist()
        torch.equal(numbers, numbers)
        numbers.to("meta")
        torch.tensor([1.0], device="meta")
        numbers.to("meta", non_blocking=True)
    assert waits.found == [
        "aten::_local_scalar_dense",
        "aten::index",
        "tolist",
        "aten::equal",
        "aten::_to_copy cpu -> meta",
        "aten::lift_fresh",
        "aten::_to_copy cpu -> meta",
    ]
