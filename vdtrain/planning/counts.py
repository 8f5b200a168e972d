"""Operations and bytes of micro-batches that were counted before: those of the stages at full size, beside this file.

A dry run at full size takes a minute. Operations grow by a straight line with the micro-batch, so five sizes give all
others. Bytes do so to a thousandth. The peak of fewer than four pairs follows no line. `make counts` counts again, and
tests/training/test_plan.py compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import trained_groups
from vdtrain.planning.dry_run import DryRun, MicroBatchMemory

FILE = Path(__file__).with_name("counts.json")
SIZES = (1, 2, 4, 32, 64)
# Of a part: no count depends on what such a file holds.
FILES = ("weights", "tokenizer", "encoder_tokenizer", "decoder_tokenizer")


@dataclass(frozen=True)
class Stored:
    """Counts from the file, with what a plan needs of a `DryRun`."""

    frozen_bytes: int
    frozen_parameters: int
    unmeasured: tuple[str, ...]
    sizes: Mapping[int, Mapping[int, MicroBatchMemory]]

    def measure(self, resolution: int, micro_batch: int) -> MicroBatchMemory:
        """On the line through the two sizes around a micro-batch, or through the two largest."""
        counted = self.sizes[resolution]
        around = next((pair for pair in pairwise(sorted(counted)) if micro_batch <= pair[1]), (SIZES[-2], SIZES[-1]))
        low, high = (asdict(counted[size]) for size in around)
        share = (micro_batch - around[0]) / (around[1] - around[0])
        return MicroBatchMemory(**{name: round(low[name] + share * (high[name] - low[name])) for name in low})


def counts(config: TrainConfig) -> Stored | DryRun:
    """The stored counts of a stage and its model; a dry run if they were not counted before."""
    entry = json.loads(FILE.read_text(encoding="utf-8")).get(key(config))
    if entry is None or not all(str(phase.resolution) in entry["sizes"] for phase in config.stage.phases):
        return DryRun(config)
    sizes = {
        int(resolution): {int(size): MicroBatchMemory(**counted) for size, counted in each.items()}
        for resolution, each in entry["sizes"].items()
    }
    return Stored(entry["frozen_bytes"], entry["frozen_parameters"], tuple(entry["unmeasured"]), sizes)


def key(config: TrainConfig) -> str:
    """A digest of all settings that a count depends on."""
    model = config.model

    def part(arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in arguments.items() if name not in FILES}

    settings = {
        "diffuser": asdict(model.diffuser),
        "modalities": {
            name: {kind: part(arguments) for kind, arguments in asdict(modality).items()}
            for name, modality in model.modalities.items()
        },
        "flows": config.stage.flows,
        "trained": trained_groups(config),
        "lora": asdict(config.lora),
        "objective": asdict(config.objective),
        "latents": config.data.latents,
        "precision": config.hardware.precision,
        "activation_checkpointing": config.hardware.activation_checkpointing,
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def entry(config: TrainConfig) -> dict[str, Any]:
    """Count a stage's phases for the file."""
    dry_run = DryRun(config)
    sizes = {
        str(phase.resolution): {str(size): asdict(dry_run.measure(phase.resolution, size)) for size in SIZES}
        for phase in config.stage.phases
    }
    return {
        "frozen_bytes": dry_run.frozen_bytes,
        "frozen_parameters": dry_run.frozen_parameters,
        "unmeasured": sorted(dry_run.unmeasured),
        "sizes": sizes,
    }
