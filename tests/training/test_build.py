"""What the configuration says of the diffuser reaches the diffuser that is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.models.diffuser import Diffuser
from vdtrain.run import distributed
from vdtrain.training import build
from vdtrain.training.build import starting_diffuser
from vdtrain.training.start import Start


@pytest.mark.parametrize(("mode", "data", "context"), [("none", 0, 0), ("context", 0, 1), ("blocks", 1, 1)])
def test_activation_checkpointing_reaches_the_layers(mode: str, data: int, context: int) -> None:
    overrides = ["model=tiny", "hardware=cpu", f"hardware.activation_checkpointing={mode}"]
    diffuser = starting_diffuser(to_object(compose("train", overrides), TrainConfig), Start(), torch.device("cpu"))

    def share(layers: nn.ModuleDict) -> float:
        """Of the layers, those that are computed again in the backward pass."""
        chosen = ["forward" in vars(layer) for modality in layers.values() for layer in modality]
        return sum(chosen) / len(chosen)

    assert (share(diffuser.data_layers), share(diffuser.context_layers)) == (data, context)


def digest(diffuser: Diffuser) -> str:
    content = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in diffuser.state_dict().items())
    return hashlib.sha256(content).hexdigest()


def build_on_ranks(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    config = to_object(compose("train", ["model=tiny", "hardware=cpu", "stage.init_from=null"]), TrainConfig)
    reads = []
    read = build.initial_weights

    def counted(*arguments: Any) -> Any:
        reads.append(distributed.rank())
        return read(*arguments)

    build.initial_weights = counted
    made = starting_diffuser(config, Start(), torch.device("cpu"))
    found = {"digest": digest(made), "reads": reads, "trained": sum(p.requires_grad for p in made.parameters())}

    def failing(*arguments: Any) -> Any:
        raise OSError(5, "Input/output error", "weights.safetensors")

    build.initial_weights = failing
    try:
        starting_diffuser(config, Start(), torch.device("cpu"))
    except distributed.SharedError as error:
        found["error"] = str(error)
    report(found)


def test_one_process_reads_the_weights_and_all_have_them(run_on_ranks: Any, tmp_path: Path) -> None:
    ranks = run_on_ranks(build_on_ranks, 2, tmp_path)
    config = to_object(compose("train", ["model=tiny", "hardware=cpu", "stage.init_from=null"]), TrainConfig)
    alone = starting_diffuser(config, Start(), torch.device("cpu"))
    assert [rank["digest"] for rank in ranks] == [digest(alone)] * 2
    assert [rank["reads"] for rank in ranks] == [[0], []]
    assert {rank["trained"] for rank in ranks} == {len(list(alone.parameters()))}
    assert all("weights.safetensors" in rank["error"] for rank in ranks)
