#!/usr/bin/env bash
# What one GPU shows of the trainer, in at most nine minutes, with PyTorch 2.11 or newer, and no network:
#
#   bash benchmarks/gpu_wheels.sh             # first, where there is a network: the packages that are missing there
#   bash benchmarks/gpu.sh                    # then, on the machine with the GPU
#   DEVICE=cpu bash benchmarks/gpu.sh         # the same parts at tiny size, to try the script
#
# PARTS names the parts to run, by default all; LIMIT is the seconds for all of them. Settings in MORE go to every bench.
# OUT, by default benchmarks/results/gpu, receives gpu.json with every figure and gpu.log with every line. Each part is
# a process with a time limit, and is printed as it ends; one that fails stops no other. The script succeeds if all do.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

device="${DEVICE:-cuda}" python="${PYTHON:-python3}" out="${OUT:-benchmarks/results/gpu}"
wheels="${WHEELS:-benchmarks/gpu_wheels}" seconds="${LIMIT:-530}" parts=" ${PARTS:-} "
read -ra more <<<"${MORE:-}"
# How many times its limit a part may take: a CPU may be busy with other things.
patience=1
if [ "$device" != cuda ]; then patience=10; fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/json"
: >"$out/gpu.log"
failed=()

if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
        --root-user-action=ignore --target "$work/site" "$wheels"/*.whl || exit
    PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# What one part compiled, the next one finds.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$work/inductor}"

# part NAME SECONDS COMMAND...: run a part within its limit and that of the script, and keep its JSON.
part() {
    local name="$1" limit=$(($2 * patience)) began="$SECONDS" left=$((seconds * patience - SECONDS)) status
    shift 2
    if [ "$parts" != "  " ] && [[ "$parts" != *" $name "* ]]; then return; fi
    if [ "$left" -lt "$limit" ]; then limit="$left"; fi
    if [ "$limit" -lt 5 ]; then
        status="no time left"
    else
        timeout --kill-after=5 "$limit" "$@" >"$work/log" 2>&1
        status="exit $?"
    fi
    [ "$status" = "exit 0" ] || failed+=("$name ($status)")
    {
        echo "== $name: $status, $((SECONDS - began)) s"
        tail -n "${LINES_SHOWN:-45}" "$work/log"
    } 2>/dev/null
    { echo "== $name: $status: $*"; cat "$work/log"; } >>"$out/gpu.log" 2>/dev/null
    rm -f "$work/log" "$work/json/"*.trace.json
    "$python" - "$work/json" "$out/gpu.json" <<'JOIN'
import json, sys
from pathlib import Path
parts = {path.stem: json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"))}
Path(sys.argv[2]).write_text(json.dumps(parts, indent=2) + "\n")
JOIN
}

# bench NAME SECONDS SETTING...
bench() {
    local name="$1" limit="$2"
    shift 2
    part "$name" "$limit" "$python" -m vdtrain bench "${size[@]}" "$@" "${more[@]}" profile=true \
        output="$work/json/$name.json" overwrite=true
}

eager=(hardware.compile=none hardware.channels_last=false)
if [ "$device" = cuda ]; then
    # The preset by the memory of the card.
    preset="$("$python" -c 'import torch
print("h200" if torch.cuda.get_device_properties(0).total_memory > 100e9 else "h100")')" || exit
    size=(hardware="$preset" micro_batches=1 warmup_steps=2 timed_steps=8)
    low=256 high=512 small=() wide=(--wide)
    compiled=(hardware.compile=blocks hardware.channels_last=true)
else
    size=(hardware=cpu model=tiny micro_batches=1 warmup_steps=1 timed_steps=2 "hardware.micro_batch_size={32:4,64:2}")
    low=32 high=64 small=(--small) wide=()
    # A compiler for the CPU takes minutes.
    compiled=(hardware.compile=none hardware.channels_last=true)
fi
four=(stage=stage3_four_flow) text_to_image=(stage=stage2_dual_flow "stage.flows=[text-to-image]")
check=("$python" benchmarks/gpu_checks.py)
if [ "$device" = cuda ]; then on=(hardware="$preset"); else on=(hardware=cpu); fi

part probes 60 "$python" benchmarks/gpu_probes.py --device "$device" "${small[@]}" --output "$work/json/probes.json"
bench eager 90 "${four[@]}" "${eager[@]}" resolution="$low"
bench compiled 130 "${four[@]}" "${compiled[@]}" resolution="$low"
part resume 40 "${check[@]}" resume "${on[@]}" "${eager[@]}" --output "$work/json/resume.json"
part losses 60 "${check[@]}" losses "${on[@]}" "${eager[@]}" "${wide[@]}" --other "${compiled[*]}" \
    --output "$work/json/losses.json"
part commands 90 "${check[@]}" commands "${on[@]}" "${eager[@]}" --output "$work/json/commands.json"
bench cached 50 "${four[@]}" "${compiled[@]}" resolution="$low" data.latents=cached
bench text_to_image 60 "${text_to_image[@]}" "${compiled[@]}" resolution="$low" data.latents=cached
bench compiled_high 90 "${four[@]}" "${compiled[@]}" resolution="$high"
bench text_to_image_high 60 "${text_to_image[@]}" "${compiled[@]}" resolution="$high" data.latents=cached

echo "== $SECONDS s; results in $out: gpu.json, gpu.log"
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'error: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
