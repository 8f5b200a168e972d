"""What a checkpoint will hold, taken out of a running engine at the end of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdtrain.training import distributed
from vdtrain.training.checkpoint_format import Index
from vdtrain.training.ema import ShardEMA
from vdtrain.training.engine import Engine
from vdtrain.training.partitions import EMA


class HostMemory:
    """CPU memory that is taken once and used again for every copy; pinned where tensors come from a GPU.

    As large as what is copied: this process's weights, both moments and average, 16 bytes per weight of its piece.
    """

    def __init__(self) -> None:
        self._places: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors' present values, whole when this returns; overwritten by the next call."""
        for name, tensor in tensors.items():
            if name not in self._places:
                self._places[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._places[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self._places[name] for name in tensors}


@dataclass(frozen=True)
class Snapshot:
    """One process's share of a checkpoint.

    Attributes:
        index: of the whole checkpoint, without its files.
        pieces: "GROUP/KIND" -> this process's flat piece, float32.
        passengers: what the stage does not train, by name; empty on all processes but the first.
    """

    index: Index
    pieces: Mapping[str, Tensor]
    passengers: Mapping[str, Tensor]

    @classmethod
    def take(
        cls,
        engine: Engine,
        ema: ShardEMA | None,
        trainer_state: dict[str, Any],
        step: int,
        memory: HostMemory,
    ) -> Snapshot:
        """The engine's and the average's present values, copied: training may go on at once."""
        partitions = engine.partitions()
        rows: dict[str, Tensor] = {}
        for position, partition in enumerate(partitions):
            group = partition.layout.group
            rows |= {f"{group}/{kind}": row for kind, row in partition.rows.items()}
            if ema is not None:
                rows[f"{group}/{EMA}"] = ema.rows[position]
        index = Index(
            step=step,
            world_size=distributed.world_size(),
            zero_stage=engine.settings.zero_stage,
            precision=engine.settings.precision,
            optimizer_steps=engine.optimizer_steps,
            ema_updates=None if ema is None else ema.updates,
            trainer=trainer_state,
            groups=tuple(partition.layout for partition in partitions),
            files={},
        )
        # Passengers stay as they are for as long as the engine lives.
        return cls(index, memory.copy(rows), engine.passengers)
