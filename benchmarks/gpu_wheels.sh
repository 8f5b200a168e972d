#!/usr/bin/env bash
# The wheels that make the trainer run where there is PyTorch, but little else of ours, and no network:
#
#   bash benchmarks/gpu_wheels.sh [FOLDER]      # by default benchmarks/gpu_wheels, which git ignores
#
# They are for CPython 3.12 on Linux x86-64, with the versions and checksums of uv.lock. That machine must itself have
# torch, torchvision, transformers, tokenizers, safetensors, pyarrow, numpy, pillow, matplotlib, einops, timm, msgpack,
# ninja, py-cpuinfo, psutil, rich and what these need.
set -euo pipefail
cd "$(dirname "$0")/.."

folder="${1:-benchmarks/gpu_wheels}"
python="${PYTHON:-python3}"
packages=(
    annotated-types antlr4-python3-runtime braceexpand deepspeed diffusers ftfy hjson hydra-core importlib-metadata
    lazy-importer omegaconf open-clip-torch pydantic pydantic-core simplejpeg typing-inspection wcwidth webdataset
)
platforms=()
for glibc in _2_28 _2_27 _2_17 2014; do
    platforms+=(--platform "manylinux${glibc}_x86_64")
done

lists="$(mktemp -d)"
trap 'rm -rf "$lists"' EXIT
"$python" - "$lists" "${packages[@]}" <<'LOCK'
"""Writes requirements with checksums: packages that the lock file has as wheels, and those to be built."""
import sys, tomllib
from pathlib import Path

lists, names = Path(sys.argv[1]), sys.argv[2:]
locked = {package["name"]: package for package in tomllib.loads(Path("uv.lock").read_text())["package"]}
for name in names:
    package = locked[name]
    files = package.get("wheels") or [package["sdist"]]
    hashes = " ".join(f"--hash={each['hash']}" for each in files)
    with (lists / ("ready" if "wheels" in package else "built")).open("a") as requirements:
        print(f"{name}=={package['version']} {hashes}", file=requirements)
LOCK

rm -rf "$folder"
mkdir -p "$folder"
pip=("$python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    --dest "$folder" --requirement "$lists/ready"
# No kernel is compiled: the trainer needs none.
DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --wheel-dir "$folder" --requirement "$lists/built"
shopt -s nullglob
wheels=("$folder"/*.whl)
if [ "${#wheels[@]}" != "${#packages[@]}" ]; then
    echo "error: ${#wheels[@]} wheels in $folder, not ${#packages[@]}: run it again" >&2
    exit 1
fi
echo "${#wheels[@]} wheels in $folder, $(du -sh "$folder" | cut -f1)"
