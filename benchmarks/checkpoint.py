"""How long a step loop waits for a checkpoint, and how fast it is written beside it.

python benchmarks/checkpoint.py [--folder /scratch] [--device cuda]     # writes benchmarks/results/checkpoint.json

One process saves flat rows as large as a process's piece of the full-size model on many GPUs, once per round, while it
goes on computing. Every round also writes the same number of bytes to the same disk plainly, from a thread beside the
same computing, out of one buffer, with one fsync at the end: what the disk gives just then. A save also takes a
checksum of every byte and removes the checkpoint before. Needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vdtrain.checkpoint.saver import BackgroundSaver
from vdtrain.checkpoint.store import CheckpointStore
from vdtrain.engine.engine import ShardEMA
from vdtrain.engine.flat import GroupLayout, ParameterSlot, Partition

RESULTS = Path(__file__).parent / "results"
GROUPS = ("global", "data.image", "context.image", "context.text")


def saving() -> bool:
    """Whether a save is being written in the background."""
    return any(thread.name.startswith("save-") for thread in threading.enumerate())


def stand_in(elements: int, device: torch.device) -> Any:
    """What saving asks of an engine, without one: rows of `elements` in all."""
    partitions = []
    for group in GROUPS:
        count = elements // len(GROUPS)
        layout = GroupLayout(group, (ParameterSlot(f"{group}.weight", (count,), 0),))
        partitions.append(Partition(layout, 0, count, *(torch.rand(count, device=device) for _ in range(3))))
    settings = SimpleNamespace(zero_stage=1, precision="bf16")
    steps = dict.fromkeys(GROUPS, 1)
    return SimpleNamespace(partitions=lambda: partitions, carried_over={}, settings=settings, group_steps=steps)


class Steps:
    """Computes, as a training step would, and counts."""

    def __init__(self, device: torch.device) -> None:
        self.weight = torch.rand(512, 512, device=device)

    def run(self, until: Any) -> float:
        """Compute until `until` is true; steps per second."""
        count, began = 0, time.perf_counter()
        while not until():
            for _ in range(4):
                self.weight = torch.tanh(self.weight @ self.weight)
            float(self.weight[0, 0])
            count += 1
        return count / (time.perf_counter() - began)


def plain_write(path: Path, content: memoryview, size: int) -> float:
    """Seconds to write `size` bytes in a row and see them onto the disk."""
    began = time.perf_counter()
    with path.open("wb") as file:
        written = 0
        while written < size:
            written += file.write(content[: size - written])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def measure(folder: Path, device: torch.device, elements: int, rounds: int) -> dict[str, Any]:
    engine = stand_in(elements, device)
    ema = ShardEMA(engine, 0.999)
    saver = BackgroundSaver(CheckpointStore(folder / "checkpoints", keep=1))
    steps = Steps(device)
    content = memoryview(os.urandom(1 << 24))
    size = 16 * elements
    alone = []
    blocked, total, plain, beside = [], [], [], []
    for step in range(rounds + 1):
        deadline = time.perf_counter() + 1.0
        alone.append(steps.run(lambda deadline=deadline: time.perf_counter() > deadline))
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(plain_write, folder / "plain", content, size)
            steps.run(writing.done)
        plain.append(writing.result())
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        saver.begin(engine, ema, {}, step)
        blocked.append(time.perf_counter() - began)
        beside.append(steps.run(lambda: not saving()))
        saver.wait()
        total.append(time.perf_counter() - began)
        assert not saver.failures()
    # The first save also takes the memory.
    middle = {name: statistics.median(values[1:]) for name, values in (("blocked", blocked), ("total", total))}
    plain_seconds = statistics.median(plain[1:])
    return {
        "bytes": size,
        "first_blocked_seconds": round(blocked[0], 3),
        "blocked_seconds": round(middle["blocked"], 3),
        "total_seconds": round(middle["total"], 3),
        "plain_write_seconds": round(plain_seconds, 3),
        "blocked_over_total": round(middle["blocked"] / middle["total"], 3),
        "write_speed_over_plain": round(plain_seconds / middle["total"], 3),
        "step_rate_while_writing_over_alone": round(statistics.median(beside[1:]) / statistics.median(alone[1:]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--elements", type=int, default=32_000_000, help="weights in this process's piece")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    # On two cores, one computes and one writes.
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    device = torch.device(arguments.device)
    try:
        found = measure(folder, device, arguments.elements, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    result = {
        "claim": "a checkpoint holds the step loop up for a copy in memory, a small share of its time",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **found,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    print(json.dumps(result, indent=2))
    (RESULTS / f"checkpoint{'_cuda' if device.type == 'cuda' else ''}.json").write_text(
        json.dumps(result, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
