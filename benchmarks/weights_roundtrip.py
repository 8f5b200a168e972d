"""Full-size weights in and out again: time, memory, and whether every bit is back.

python benchmarks/weights_roundtrip.py --precision fp16 --folder /tmp/roundtrip

Random weights of the full size are written in the layout of the released vd-four-flow-v1-0, imported, exported in that
layout, imported again, and compared with what they were made of. Each step is a process of its own, watched from
outside: seconds, peak resident memory, and the share of it that is not pages of files, which the system can take back.
A step's input is deleted when it is done, so that the disk holds two copies.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from published_weights import diffuser
from watched import GB, Watched

from vdtrain.config.command_schema import WeightsConfig
from vdtrain.config.compose import compose, to_object
from vdtrain.weights.exports import write_torch
from vdtrain.weights.folder import open_weights_folder
from vdtrain.weights.published.versatile_diffusion import to_released
from vdtrain.weights.tensor_files import LazyTensors

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def random_weights(precision: str) -> LazyTensors:
    """The full-size diffuser by our names; a tensor is drawn when it is read, the same each time."""
    return diffuser(to_object(compose("weights", []), WeightsConfig).model).cast(DTYPES[precision])


def write(precision: str, path: Path) -> None:
    """The released file, as if it had been downloaded."""
    tensors = random_weights(precision)
    write_torch(path, tensors.renamed({to_released(name): name for name in tensors}))


def compare(precision: str, folder: Path) -> None:
    """Exit with an error unless the folder holds the random weights, bit for bit."""
    expected, found = random_weights(precision), open_weights_folder(folder)
    assert found.keys() == expected.keys()
    for name in expected:
        given, drawn = found[name], expected[name]
        assert given.dtype == drawn.dtype, name
        assert torch.equal(given.view(torch.uint8), drawn.view(torch.uint8)), name


def watched(name: str, command: list[str]) -> dict[str, Any]:
    """Run a step; its seconds and peak memory in GB."""
    with Watched() as watch:
        process = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{process.stderr}")
    found = {
        "seconds": round(watch.seconds, 1),
        "peak_resident_GB": round(watch.resident / GB, 2),
        "peak_anonymous_GB": round(watch.own / GB, 2),
    }
    print(name, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp16")
    parser.add_argument("--folder", type=Path, required=True, help="with room for two copies (fp16 5.2 GB each)")
    parser.add_argument("--step", choices=["write", "compare"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    precision, folder = arguments.precision, arguments.folder
    published, first, exported, second = (folder / name for name in ("vd.pth", "first", "exported.pth", "second"))
    if arguments.step:
        (write if arguments.step == "write" else compare)(precision, published if arguments.step == "write" else second)
        return
    parameters = sum(entry.shape.numel() for entry in random_weights(precision).entries.values())
    folder.mkdir(parents=True)
    own = [__file__, "--precision", precision, "--folder", str(folder), "--step"]
    command = ["-m", "vdtrain.cli", "weights"]
    steps = {}
    try:
        steps["write"] = watched("write", [*own, "write"])
        published_bytes = published.stat().st_size
        importing = [*command, "import", "versatile_diffusion"]
        steps["import"] = watched("import", [*importing, str(published), f"output={first}"])
        published.unlink()
        exporting = [*command, "export", "versatile_diffusion", str(exported), f"checkpoint={first}"]
        steps["export"] = watched("export", exporting)
        shutil.rmtree(first)
        steps["import again"] = watched("import again", [*importing, str(exported), f"output={second}"])
        exported.unlink()
        steps["compare"] = watched("compare", [*own, "compare"])
    finally:
        shutil.rmtree(folder)
    result = {
        "claim": "full-size weights come back bit for bit; an import holds less than 1 GB besides pages of files, "
        "an export the whole file",
        "precision": precision,
        "parameters": parameters,
        "file_bytes": published_bytes,
        "identical": True,
        "steps": steps,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} of its cores",
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"weights_roundtrip_{precision}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
