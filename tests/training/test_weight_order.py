"""Convolutions' weights that keep their channels last in the flat buffers, and checkpoints that change their order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.toy import ZERO, RunOnRanks, full_rows, full_weights, gather, same_bits, settings
from vdtrain.checkpoint.folder import INDEX_FILE
from vdtrain.checkpoint.store import CheckpointStore, HostMemory, Snapshot, Verification, latest, load
from vdtrain.engine.engine import Engine, ShardEMA
from vdtrain.engine.flat import OWN_ALIGNMENT, GroupLayout, ParameterSlot, lay_out_zeros

# DeepSpeed's buffers have every weight in the order of its shape.
CASES = [*((stage, "bf16") for stage in ZERO), (0, "fp32")]
KEEPING = [stage for stage in ZERO if not isinstance(stage, int) or stage == 0]


class Convolutions(nn.Module):
    """Odd numbers of elements, so that a partition ends within a weight."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)
        self.linear = nn.Linear(7, 7)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.linear(self.second(self.first(images).relu()))
        return out


def made(stage: int | str, channels_last: bool, precision: str) -> tuple[Engine, ShardEMA]:
    module = Convolutions(channels_last)
    groups = {"global": dict(module.named_parameters())}
    engine = Engine(module, groups, settings(zero_stage=stage, precision=precision))
    return engine, ShardEMA(engine)


def trained(engine: Engine, ema: ShardEMA) -> None:
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 3, 7, 7, generator=generator).to(engine.compute_dtype)
        engine.backward((engine(images).float() - 1).square().mean(), last=True)
        ema.update(engine.step(1e-2).applied)


def held(engine: Engine, ema: ShardEMA) -> dict[str, Tensor]:
    """Weights, moments and averages by name."""
    rows = {kind: full_rows(engine, kind) for kind in ("master", "exp_avg", "exp_avg_sq")}
    rows["ema"] = gather(ema.buffers, [partition.layout for partition in engine.partitions()])
    return {f"{kind}/{name}": tensor.contiguous() for kind, row in rows.items() for name, tensor in row.items()}


def cases(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    results: dict[str, Any] = {}
    for stage, precision in CASES:
        for last in (False, True):
            engine, ema = made(stage, last, precision)
            trained(engine, ema)
            name = f"{stage}-{precision}-{last}"
            store = CheckpointStore(folder / name, keep=1)
            path = store.write(Snapshot.take(engine, ema, {}, 2, HostMemory()))
            before = held(engine, ema)
            index = json.loads((path / INDEX_FILE).read_text())["checkpoint"]
            turned = [slot for slot in index["groups"][0]["parameters"] if "channels_last" in slot]
            checkpoint = latest(folder / name, Verification.TOGETHER)
            assert checkpoint is not None
            public = {key: tensor.clone() for key, tensor in checkpoint.weights().items()}
            own = {key: tensor.contiguous() for key, tensor in full_weights(engine).items()}
            results[name] = {
                "format": index["format"],
                "alignment": index["groups"][0].get("alignment"),
                "turned": [slot["name"] for slot in turned],
                "strides": list(engine.module.first.weight.stride()),  # type: ignore[union-attr, operator]
                "public_bits": same_bits(public, own),
                "taken_up": {},
                "weights": {key: each.tolist() for key, each in own.items()},
            }
            engine.close()
            for other in ZERO:
                for order in (False, True):
                    engine, ema = made(other, order, precision)
                    load(checkpoint, engine, ema)
                    results[name]["taken_up"][f"{other}-{order}"] = same_bits(held(engine, ema), before)
                    module = {key: each.contiguous() for key, each in engine.module.state_dict().items()}
                    rounded = {key: each.to(engine.compute_dtype).contiguous() for key, each in public.items()}
                    results[name]["taken_up"][f"{other}-{order}-module"] = same_bits(module, rounded)
                    engine.close()
    report(results)


@pytest.fixture(scope="module")
def results(run_on_ranks: RunOnRanks, tmp_path_factory: Any) -> dict[str, Any]:
    found: dict[str, Any] = run_on_ranks(cases, 2, tmp_path_factory.mktemp("order"))[0]
    return found


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_weights_lie_as_the_strategy_keeps_them(results: dict[str, Any], stage: int | str, precision: str) -> None:
    plain, last = results[f"{stage}-{precision}-False"], results[f"{stage}-{precision}-True"]
    assert (plain["turned"], plain["strides"]) == ([], [27, 9, 3, 1])
    # Partitions of the engine's own exchange end elsewhere than DeepSpeed's.
    assert plain["format"] == last["format"] == (3 if stage in KEEPING else 1)
    # What is not written is what earlier versions had.
    assert plain["alignment"] == last["alignment"] == (OWN_ALIGNMENT if stage in KEEPING else None)
    if stage in KEEPING:
        assert (last["turned"], last["strides"]) == (["first.weight", "second.weight"], [27, 1, 9, 3])
    else:
        assert (last["turned"], last["strides"]) == ([], [27, 9, 3, 1])


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_the_order_changes_no_update(results: dict[str, Any], stage: int | str, precision: str) -> None:
    plain, last = results[f"{stage}-{precision}-False"]["weights"], results[f"{stage}-{precision}-True"]["weights"]
    bound = 1e-5 if precision == "fp32" else 1e-3
    for name, values in plain.items():
        torch.testing.assert_close(torch.tensor(last[name]), torch.tensor(values), rtol=0.0, atol=bound)


def test_every_strategy_and_order_takes_up_every_other(results: dict[str, Any]) -> None:
    assert len(results) == 2 * len(CASES)
    for name, found in results.items():
        assert found["public_bits"], name
        assert len(found["taken_up"]) == 4 * len(ZERO)
        assert all(found["taken_up"].values()), (name, found["taken_up"])


def test_a_part_of_a_buffer_is_read_in_another_order() -> None:
    plain, last = Convolutions(False), Convolutions(True)
    modules = (dict(module.named_parameters()) for module in (last, plain))
    own, other = (GroupLayout.of("global", parameters, deepspeed=False) for parameters in modules)
    assert own == other
    whole = torch.cat([tensor.detach().reshape(-1) for tensor in plain.parameters()])
    turned = torch.cat([slot.flat(tensor.detach()) for slot, tensor in zip(own.slots, last.parameters(), strict=True)])
    assert not torch.equal(whole, turned)

    def read(start: int, stop: int) -> Tensor:
        return whole[start:stop].clone()

    for start in range(0, own.numel, 17):
        for stop in (start, start + 1, start + 40, own.numel):
            torch.testing.assert_close(own.read(other, read, start, stop), turned[start:stop], rtol=0.0, atol=0.0)


def test_only_a_convolution_has_channels_last() -> None:
    with pytest.raises(ValueError, match=r"x: channels last, but its shape is \[2, 3\]"):
        ParameterSlot("x", (2, 3), 0, channels_last=True)


def where(module: nn.Module) -> dict[str, list[Any]]:
    """Type, strides and place of each parameter."""
    return {
        name: [str(each.dtype), each.stride(), each.storage_offset(), each.requires_grad]
        for name, each in module.named_parameters()
    }


def pointwise() -> tuple[nn.Module, dict[str, dict[str, nn.Parameter]]]:
    """Convolutions of 1x1, whose weights are contiguous in both orders, and a layer that is not trained."""
    module = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 3, 3), nn.Conv2d(3, 3, 1), nn.Linear(2, 2))
    module.to(memory_format=torch.channels_last)
    module[3].requires_grad_(False)
    groups = {"first": dict(module[0].named_parameters(prefix="0")), "data": {}}
    groups["data"] = {name: each for name, each in module.named_parameters() if name[0] in "12"}
    return module, groups


def placed(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    module, groups = pointwise()
    engine = Engine(module, groups, settings(zero_stage=1, precision="bf16"))
    alone, groups = pointwise()
    alone.to(torch.bfloat16)
    lay_out_zeros(groups, torch.bfloat16)
    report({"engine": where(engine.module), "zeros": where(alone)})
    engine.close()


def test_zeros_lie_as_weights_in_training(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    found = run_on_ranks(placed, 1, tmp_path)[0]
    assert found["zeros"] == found["engine"]
