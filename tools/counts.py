"""Count the operations and bytes of the stages at full size again: vdtrain/planning/counts.json.

python -m tools.counts        `make counts`; takes ten minutes and needs no GPU
"""

from __future__ import annotations

import json

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.files import atomic_write
from vdtrain.planning.counts import FILE, entry, key

CURRICULUM = ("stage1_single_flow", "stage2_dual_flow", "stage3_four_flow")
# Every preset of a GPU computes in bf16, and a count depends on nothing else of it. Fine-tuning trains as stage 3 does.
CASES = [
    *(
        [f"stage={stage}", f"hardware.activation_checkpointing={mode}"]
        for mode in ("none", "context", "blocks")
        for stage in CURRICULUM
    ),
    *([f"stage={stage}", "data.latents=cached"] for stage in CURRICULUM),
]


def config_of(words: list[str]) -> TrainConfig:
    """The settings of a case."""
    return to_object(compose("train", words), TrainConfig)


def main() -> None:
    """Count every case, and write the file."""
    made = {}
    for words, config in [(words, config_of(words)) for words in CASES]:
        print(" ".join(words), flush=True)
        made[key(config)] = {"settings": words, **entry(config)}
    with atomic_write(FILE) as draft:
        draft.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
