"""benchmarks/gpu.sh on a CPU, in an environment as on the machine that it is for: PyTorch 2.11, and our wheels.

What its first part compiles is tried apart, with the PyTorch that is installed here: compiling takes minutes on a CPU.

Python 3.12, PyTorch 2.11 and what that machine has are installed first, and `vdtrain train` runs there: what it needs
beside them, `gpu_wheels.sh` has gathered. Some minutes, and 600 MB to fetch the first time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "timm==1.0.22", "nvidia-curand")
# With what these need.
THERE = (
    *("transformers==5.17.0", "tokenizers==0.23.2", "huggingface_hub==1.33.0", "safetensors", "numpy", "pyarrow"),
    *("pillow", "rich", "requests", "regex", "einops", "msgpack", "ninja", "py-cpuinfo", "psutil", "setuptools"),
    *("typing-extensions", "filelock", "sympy", "networkx", "jinja2", "fsspec", "pyyaml", "tqdm", "packaging"),
    "matplotlib",
)
WHEELS = 18
COMPILED = (
    *("stage=stage3_four_flow", "hardware=cpu", "model=tiny", "hardware.compile=blocks", "hardware.channels_last=true"),
    *("hardware.micro_batch_size={32:2}", "micro_batches=1", "warmup_steps=1", "timed_steps=1"),
)
HALVES = ("[image-to-image,text-to-image]", "[image-to-text,text-to-text]")
# Prints how often the bench found its code in the compiler's caches, and how often it did not.
COUNTING = """
import json, sys
from torch._dynamo.utils import counters
from vdtrain.commands.bench import main
status = main(sys.argv[1:])
print(json.dumps({**counters["inductor"], **counters["aot_autograd"]}))
sys.exit(status)
"""


def uv() -> str:
    found = shutil.which("uv") or str(ROOT / ".tools" / "bin" / "uv")
    if not Path(found).exists():
        pytest.skip("PyTorch 2.11: uv is not installed")
    return found


def python_312() -> str:
    """An interpreter of Python 3.12 that starts."""
    for path in (shutil.which("python3.12"), *sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12"))):
        if path and not subprocess.run([str(path), "-c", ""], capture_output=True, check=False).returncode:
            return str(path)
    pytest.skip("PyTorch 2.11: no Python 3.12 here")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment as on the machine with the GPU, without any of ours."""
    folder = tmp_path_factory.mktemp("machine") / "venv"
    python = folder / "bin" / "python"
    # PyTorch loads NVIDIA's libraries by names that are the same in the versions here.
    nvidia = [f"{each.name}=={each.version}" for each in distributions() if each.name.startswith("nvidia-")]
    install = [uv(), "pip", "install", "--quiet", "--python", str(python)]
    for words in (
        [uv(), "venv", "--quiet", "--seed", "--python", python_312(), str(folder)],
        [*install, "--no-deps", *TORCH, *nvidia],
        [*install, *THERE],
    ):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"PyTorch 2.11: cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def wheels(machine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    command = ["bash", str(ROOT / "benchmarks" / "gpu_wheels.sh"), str(folder)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": str(machine)}, capture_output=True, text=True, check=False
    )
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip(f"the wheels cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_all_parts(machine: Path, wheels: Path, tmp_path: Path) -> None:
    found = list(wheels.glob("*.whl"))
    assert len(found) == WHEELS
    assert sum(each.stat().st_size for each in found) < 16e6
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"DEVICE": "cpu", "PARTS": "all"}
    settings |= {"PYTHON": str(machine), "WHEELS": str(wheels), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")],
        env={**environment, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.log"]
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    probes = results["probes"]
    assert probes["versions"]["torch"].startswith("2.11.0")
    assert {row["part"] for row in probes["rows"]} == {
        *("matrix product", "convolution", "attention", "group norm and SiLU")
    }
    for row in probes["rows"]:
        if row["part"] == "attention" and "refused" not in row:
            assert max(row["forward_error"], row["backward_error"]) < 1e-3
    assert results["resume"]["largest_difference"] == 0 < results["resume"]["largest_movement"]
    assert results["losses"]["largest_relative_difference"] < 1e-3
    assert results["commands"]["passed"]
    for name in ("compiled", "cached", "text_to_image", "eager", "text_to_image_eager"):
        high = "text_to_image_high_eager" if name == "text_to_image_eager" else f"{name}_high"
        for each in (name, high):
            assert results[each]["speed"]["pairs_per_second"] > 0
    assert results["replays"]["failed"] == results["update"]["failed"] == []
    for how in ("low", "high"):
        assert f"== ahead_{how}: exit 0" in done.stdout
        assert f"== ahead_text_{how}: exit 0" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed, for Inductor's CPU code")
def test_bench_finds_what_was_compiled_ahead(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    script = str(ROOT / "benchmarks" / "gpu_compile.py")
    # At once, as in gpu.sh.
    ahead = [
        subprocess.Popen([sys.executable, script, *COMPILED, f"stage.flows={flows}"], env=environment)
        for flows in HALVES
    ]
    assert [process.wait() for process in ahead] == [0, 0]
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, *COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    missed = {name: count for name, count in counts.items() if "cache_miss" in name or "cache_bypass" in name}
    assert not missed
    # Graphs, and the code of their forward and backward passes.
    assert counts["autograd_cache_hit"] > 20
    assert counts["fxgraph_cache_hit"] > 40


# Stands for Python: the preset of the card, a check of replays that fails, and parts that end well.
STUB = """\
#!/bin/sh
case "$*" in
    -c*) echo h200 ;;
    *gpu_graphs.py*eager*) exit {status} ;;
esac
"""


@pytest.mark.parametrize("status", [0, 1])
def test_where_no_graph_can_be_recorded_the_parts_run_without(tmp_path: Path, status: int) -> None:
    python = tmp_path / "python"
    python.write_text(STUB.format(status=status))
    python.chmod(0o755)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PARTS", "MORE", "TRACES", "LIMIT")
    }
    settings = {"DEVICE": "cuda", "PYTHON": str(python), "WHEELS": str(tmp_path), "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")], env=environment | settings, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    log = (tmp_path / "gpu.log").read_text()
    plain = {"update", "ahead_low", "ahead_text_low", "ahead_high", "ahead_text_high", "resume", "cached", "losses"}
    with_graphs = {"graphs", "graphs_high", "graphs_cached", "graphs_cached_high", "graphs_text_to_image_high"}
    without = {"compiled", "compiled_high", "cached_high", "text_to_image_high"}
    assert set(re.findall(r"^== (\w+): exit", log, re.M)) == {"replays", *plain, *(without if status else with_graphs)}
    assert ("cuda_graphs=true" in log) == (status == 0)
