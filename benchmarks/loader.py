"""Loaders on the same shards and cores: images per CPU second, beside the decoder alone; how well each shuffles.

python benchmarks/loader.py                       # all parts; writes benchmarks/results/loader.json
python benchmarks/loader.py --parts throughput --rounds 5 --cores 0,1

Throughput: 512-pixel JPEGs to 256 x 256 images and CLIP ids, by vdtrain's stream, by open_clip's WebDataset pipeline
(Pillow), by WebDataset and by MosaicML Streaming with vdtrain's decoder. Streaming needs an older transformers, and so
an environment of its own: `--streaming-python` names one, or uv makes one from loader_requirements.txt.
Shuffle: whether neighbours come from the same shard. Restart: seconds until the first batch deep in an epoch.

Each contestant runs by itself, pinned to the same cores, in turn in every round. Rates are per CPU second over all its
threads and processes, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vdtrain.tracking.surroundings import processor, versions

HERE = Path(__file__).parent
RESULT = HERE / "results" / "loader.json"
PARTS = ("throughput", "shuffle", "restart")
# (name in the table, contestant, workers, more of its task)
RUNS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("decode only", "limit", 1, {}),
    ("decode only", "limit", 2, {}),
    ("vdtrain", "vdtrain", 1, {}),
    ("vdtrain", "vdtrain", 2, {}),
    ("vdtrain, BERT ids too", "vdtrain", 2, {"bert": True}),
    ("WebDataset, expert", "webdataset", 0, {}),
    ("WebDataset, expert", "webdataset", 2, {}),
    ("indexed reader of forty lines", "indexed", 0, {}),
    ("indexed reader of forty lines", "indexed", 2, {}),
    ("Streaming, expert", "streaming", 0, {}),
    ("Streaming, expert", "streaming", 2, {}),
    ("open_clip style", "open_clip", 0, {"batches": 6, "warm": 1}),
    ("open_clip style", "open_clip", 2, {"batches": 8, "warm": 3}),
]


def streaming_python(given: str | None, folder: Path) -> str | None:
    """An interpreter that has Streaming; None where there is none, which is said."""
    if given:
        return given
    uv = shutil.which("uv") or str(HERE.parent / ".tools" / "bin" / "uv")
    requirements = str(HERE / "loader_requirements.txt")
    python = folder / "streaming" / "bin" / "python"
    try:
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder / "streaming")], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), "-r", requirements], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"Streaming is left out: no environment for it ({error}); name one with --streaming-python", flush=True)
        return None
    return str(python)


def run(task: dict[str, Any], python: str) -> dict[str, float]:
    """The rates of one contestant in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [python, str(HERE / "loader_contestants.py"), json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RATES ")]
    if done.returncode or (not lines and task["contestant"] != "mds"):
        raise SystemExit(f"{task['contestant']} failed:\n{done.stderr[-2000:]}")
    rates: dict[str, float] = json.loads(lines[0].removeprefix("RATES ")) if lines else {}
    return rates


def throughput(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rates of all contestants, and how they stand to each other."""
    from loader_images import write_set

    if arguments.images is not None:
        folder = arguments.images
    else:
        write_set(folder, 4, arguments.samples, len(os.sched_getaffinity(0)))
    python = streaming_python(arguments.streaming_python, folder)
    if python is not None and not (folder / "mds").exists():
        run({"contestant": "mds", "folder": str(folder)}, python)
    rounds: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for name, contestant, workers, more in RUNS:
            if contestant == "streaming" and python is None:
                continue
            task = {"folder": str(folder), "resolution": 256, "batch": 128, "warm": 8, "batches": arguments.batches}
            task |= {"contestant": contestant, "workers": workers, **more}
            rates = run(task, python if contestant == "streaming" and python else sys.executable)
            rounds.append({"round": number, "contestant": name, "workers": workers, **rates})
            print(json.dumps(rounds[-1]), flush=True)
    sizes = [path.stat().st_size for path in (folder / "shards").glob("*.tar")]
    return {
        "resolution": 256,
        "batch": 128,
        "images": {"shards": len(sizes), "megabytes": round(sum(sizes) / 1e6)},
        **summary(rounds),
        "left_out": [] if python is not None else ["Streaming"],
        "rounds": rounds,
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Best and median of each contestant, and the ratios that are claimed, from the medians of one run."""
    table = []
    for name, workers in dict.fromkeys((row["contestant"], row["workers"]) for row in rounds):
        own = [row for row in rounds if (row["contestant"], row["workers"]) == (name, workers)]
        cpu = [row["images_per_cpu_second"] for row in own]
        wall = [row["images_per_second"] for row in own]
        table.append(
            {
                "contestant": name,
                "workers": workers,
                "images_per_cpu_second": {"median": statistics.median(cpu), "best": max(cpu)},
                "images_per_second": {"median": statistics.median(wall), "best": max(wall)},
            }
        )

    def rate(name: str, workers: int | None = None, kind: str = "images_per_cpu_second") -> float:
        """Of the contestant's fastest way, unless its workers are named."""
        own = [row for row in table if row["contestant"] == name and workers in (None, row["workers"])]
        return max((row[kind]["median"] for row in own), default=0.0)

    others = ["WebDataset, expert", "indexed reader of forty lines", "Streaming, expert", "open_clip style"]
    return {
        "table": table,
        "ratios": {
            "over_open_clip_style_with_two_workers": round(rate("vdtrain", 2) / rate("open_clip style", 2), 2),
            "over_open_clip_style_at_its_best": round(rate("vdtrain", 2) / rate("open_clip style"), 2),
            "over_fastest_other_with_two_workers": round(rate("vdtrain", 2) / max(rate(name, 2) for name in others), 2),
            "over_fastest_other_at_its_best": round(rate("vdtrain", 2) / max(rate(name) for name in others), 2),
            "of_decode_only_with_two_workers": round(rate("vdtrain", 2) / rate("decode only", 2), 2),
            "of_decode_only_with_two_workers_by_the_clock": round(
                rate("vdtrain", 2, "images_per_second") / rate("decode only", 2, "images_per_second"), 2
            ),
        },
    }


def show(found: dict[str, Any]) -> None:
    """The tables, as docs/benchmarks.md has them."""
    if "throughput" in found:
        print("\n| | workers | images per CPU second | images per second |\n|---|---|---|---|")
        for row in found["throughput"]["table"]:
            cpu, wall = row["images_per_cpu_second"]["median"], row["images_per_second"]["median"]
            print(f"| {row['contestant']} | {row['workers']} | {cpu:.0f} | {wall:.0f} |")
        print("\n".join(f"{name}: {ratio}" for name, ratio in found["throughput"]["ratios"].items()))
    for part in PARTS[1:]:
        if part in found:
            print(f"\n{part}:\n" + "\n".join(f"  {json.dumps(row)}" for row in found[part]["table"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure; the others' results stay")
    parser.add_argument("--cores", default=None, help="numbers of the cores to be pinned to; two of them by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1000, help="images in each of the four shards")
    parser.add_argument("--batches", type=int, default=30, help="measured in each run, of 128")
    parser.add_argument("--images", type=Path, help="a folder of an earlier run's shards")
    parser.add_argument("--streaming-python", help="an interpreter that has mosaicml-streaming, torch, simplejpeg")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: known are {', '.join(PARTS)}")
    cores = sorted(os.sched_getaffinity(0))[-2:]
    if arguments.cores is not None:
        cores = [int(core) for core in arguments.cores.split(",")]
    os.sched_setaffinity(0, cores)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found["claim"] = "the stream decodes near the decoder's own rate, above the loaders that it replaces"
    found["hardware"] = {"processor": processor(), "cores": len(cores)}
    found["versions"] = versions("torch", "simplejpeg", "webdataset", "open_clip_torch", "pillow", "tokenizers")
    with tempfile.TemporaryDirectory(prefix="loader-") as name:
        folder = Path(name)
        if "throughput" in parts:
            found["throughput"] = throughput(arguments, folder / "set")
        if "shuffle" in parts:
            from loader_shuffle import shuffle

            python = streaming_python(arguments.streaming_python, folder)
            found["shuffle"] = shuffle(python)
        if "restart" in parts:
            from loader_restart import restart

            found["restart"] = restart(folder / "restart")
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    show(found)


if __name__ == "__main__":
    main()
