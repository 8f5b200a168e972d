"""What samples and validation cost a run, beside their budget: the tiny preset, one process, one thread.

python benchmarks/watching.py            # writes benchmarks/results/watching.json; some minutes

One process trains the same steps twice, in turns of a few: with looks and without them. The looks count CPU seconds of
this process, which other programs on the machine change little. A second part lets the budget decide, as in a real
run: looks are asked for so often that they would take far more than their share.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.pairs import write_pairs
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.run import distributed
from vdtrain.tracking.surroundings import commit, processor, versions
from vdtrain.training import watching
from vdtrain.training.build import build_trainer
from vdtrain.training.start import resolve_start

RESULT = Path(__file__).parent / "results" / "watching.json"
BATCH = 16
SETTINGS = (
    *("model=tiny", "data=shapes", "hardware=cpu", "tracking=none", "stage=stage3_four_flow", "stage.init_from=null"),
    *(f"stage.global_batch_size={BATCH}", "data.validation.share=0.1", "checkpoint.every_steps=100000"),
    *("log_every_steps=50", "optimizer.warmup_samples=0", "watchdog_seconds=null", "validation.pairs=16"),
)


def run(folder: Path, name: str, steps: int, *overrides: str) -> dict[str, Any]:
    """Train; CPU seconds of all and of the looks, and how many there were."""
    phases = f"stage.phases=[{{resolution:32,samples:{steps * BATCH}}}]"
    words = [*SETTINGS, phases, f"data.manifest={folder}/data/manifest", f"run_dir={folder}/{name}", *overrides]
    document = compose("train", words)
    config = to_object(document, TrainConfig)
    Path(config.run_dir).mkdir(parents=True)
    place = distributed.start("cpu")
    trainer = build_trainer(config, document, resolve_start(config, document), place)
    taken: list[float] = []
    look = trainer.watching._look

    def measured(chosen: list[str]) -> None:
        began = time.process_time()
        look(chosen)
        if chosen:
            taken.append(time.process_time() - began)

    trainer.watching._look = measured  # type: ignore[method-assign]
    began = time.process_time()
    trainer.run()
    whole = time.process_time() - began
    looks = {each: vars(moments) for each, moments in trainer.watching.looks.items()}
    distributed.finish()
    return {"cpu_seconds": whole, "look_cpu_seconds": taken, "looks": looks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of the run with a budget")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every = 10 * BATCH
    with tempfile.TemporaryDirectory(prefix="watching-") as place:
        folder = Path(place)
        write_pairs(folder / "data", shards=4, count=100)
        off = run(folder, "off", arguments.steps)
        share = [f"{kind}.time_share=0.1" for kind in watching.KINDS]
        often = [f"{kind}.every={every}" for kind in watching.KINDS]
        on = run(folder, "on", arguments.steps, *often, *share)
    looks = on["look_cpu_seconds"]
    # The first look and that at the end of the phase come in any case.
    exempt = looks[0] + looks[-1]
    result = {
        "claim": "looks keep to their share of the run's time, and beside them training costs what it did",
        "steps": arguments.steps,
        "every_samples": every,
        "asked_for": 1 + arguments.steps * BATCH // every,
        "made": len(looks),
        "time_share": 0.2,
        "share_of_cpu_time": round(sum(looks) / on["cpu_seconds"], 4),
        "share_without_start_and_end": round((sum(looks) - exempt) / on["cpu_seconds"], 4),
        "training_cpu_over_training_without_looks": round((on["cpu_seconds"] - sum(looks)) / off["cpu_seconds"], 3),
        "one_look_in_training_steps": round(
            sum(looks) / len(looks) / ((on["cpu_seconds"] - sum(looks)) / arguments.steps), 1
        ),
        "off": off,
        "on": on,
        "machine": {"cpu": processor(), "versions": versions(), "commit": commit()},
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("off", "on", "machine")}, indent=2))


if __name__ == "__main__":
    main()
