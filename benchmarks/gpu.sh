#!/usr/bin/env bash
# What one GPU shows of the trainer, in at most nine minutes, with PyTorch 2.11 or newer, and no network:
#
#   bash benchmarks/gpu_wheels.sh             # first, where there is a network: the packages that are missing there
#   bash benchmarks/gpu.sh                    # then, on the machine with the GPU: the first parts
#   PARTS="eager cached probes" bash benchmarks/gpu.sh    # others, in a second call; TRACES="cached" keeps its trace
#   DEVICE=cpu PARTS=all bash benchmarks/gpu.sh    # all parts at tiny size, to try the script
#
# LIMIT is the seconds for all parts of a call. Settings in MORE go to every bench. OUT, by default
# benchmarks/results/gpu, receives gpu.json with every figure and gpu.log with every line. Each part is a process with a
# time limit, and is printed as it ends; one that fails stops no other. The script succeeds if all do.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

device="${DEVICE:-cuda}" python="${PYTHON:-python3}" out="${OUT:-benchmarks/results/gpu}"
first="replays update ahead resume graphs graphs_high cached graphs_cached graphs_cached_high"
first+=" graphs_text_to_image_high losses"
wheels="${WHEELS:-benchmarks/gpu_wheels}" seconds="${LIMIT:-530}" parts=" ${PARTS:-$first} "
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
# What one part compiled, the next one finds; Python's own bytecode too.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$work/inductor}"
export PYTHONPYCACHEPREFIX="$work/bytecode"
unset PYTHONDONTWRITEBYTECODE

# A CPU has no CUDA graphs: there the parts would repeat others.
recorded="$device"
wanted() { [[ ("$parts" == *" all "* || "$parts" == *" $1 "*) && ("$recorded" == cuda || "$1" != graphs*) ]]; }

# start NAME SECONDS COMMAND...: begin a part, within its limit and that of the script.
declare -A process began command
start() {
    local name="$1" limit=$(($2 * patience)) left=$((seconds * patience - SECONDS))
    shift 2
    if ! wanted "$name"; then return; fi
    if [ "$left" -lt "$limit" ]; then limit="$left"; fi
    began[$name]="$SECONDS" command[$name]="$*"
    if [ "$limit" -lt 5 ]; then
        (echo "no time left"; exit 124) >"$work/$name.log" &
    else
        timeout --kill-after=5 "$limit" "$@" >"$work/$name.log" 2>&1 &
    fi
    process[$name]=$!
}

# finish NAME: wait for a part that was begun, print its last lines, and keep its JSON.
finish() {
    local name="$1" status
    if [ -z "${process[$name]:-}" ]; then return; fi
    wait "${process[$name]}"
    status="exit $?"
    unset "process[$name]"
    [ "$status" = "exit 0" ] || failed+=("$name ($status)")
    echo "== $name: $status, $((SECONDS - began[$name])) s"
    tail -n "${LINES_SHOWN:-45}" "$work/$name.log"
    { echo "== $name: $status: ${command[$name]}"; cat "$work/$name.log"; } >>"$out/gpu.log"
    if [[ " ${TRACES:-} " == *" $name "* ]]; then gzip -c "$work/json/$name.trace.json" >"$out/$name.trace.json.gz"; fi
    rm -f "$work/json/$name.trace.json"
    "$python" - "$work/json" "$out/gpu.json" <<'JOIN'
import json, sys
from pathlib import Path
files = [path for path in sorted(Path(sys.argv[1]).glob("*.json")) if not path.name.endswith(".trace.json")]
parts = {}
for path in files:
    try:
        parts[path.stem] = json.loads(path.read_text())
    except ValueError:  # a part that still runs is writing it
        continue
Path(sys.argv[2]).write_text(json.dumps(parts, indent=2) + "\n")
JOIN
}

part() {
    start "$@"
    finish "$1"
}

# bench HOW NAME SECONDS SETTING...: HOW is part or start.
bench() {
    local how="$1" name="$2" limit="$3"
    shift 3
    "$how" "$name" "$limit" "$python" -m vdtrain bench "${size[@]}" "$@" "${more[@]}" profile=true \
        output="$work/json/$name.json" overwrite=true
}

eager=(hardware.compile=none hardware.channels_last=false)
if [ "$device" = cuda ]; then
    # The preset by the memory of the card.
    preset="$("$python" -c 'import torch
print("h200" if torch.cuda.get_device_properties(0).total_memory > 100e9 else "h100")')" || exit
    size=(hardware="$preset" micro_batches=1 warmup_steps=2 timed_steps=8)
    low=256 high=512 small=() wide=(--wide)
    # Twice the pairs of a four-flow micro-batch: its two flows to images share a batch, and so the compiled code.
    if [ "$preset" = h200 ]; then
        double=("hardware.micro_batch_size={256:128}") double_high=("hardware.micro_batch_size={512:32}")
    else
        double=("hardware.micro_batch_size={256:64}") double_high=("hardware.micro_batch_size={512:16}")
    fi
    compiled=(hardware.compile=blocks hardware.channels_last=true) graphs=(hardware.cuda_graphs=true)
else
    size=(hardware=cpu model=tiny micro_batches=1 warmup_steps=1 timed_steps=2 "hardware.micro_batch_size={32:4,64:2}")
    preset=cpu low=32 high=64 small=(--small) wide=() double=("hardware.micro_batch_size={32:8}")
    double_high=("hardware.micro_batch_size={64:4}")
    # A compiler for the CPU takes minutes.
    compiled=(hardware.compile=none hardware.channels_last=true) graphs=()
fi
four=(stage=stage3_four_flow) text_to_image=(stage=stage2_dual_flow "stage.flows=[text-to-image]")
check=("$python" benchmarks/gpu_checks.py)
if [ "$device" = cuda ]; then on=(hardware="$preset"); else on=(hardware=cpu); fi

# Compiling takes one core of the CPU minutes, and the GPU little. Four processes do it at once for the parts that follow.
# Meanwhile the GPU has time for checks whose speed is of no interest.
ahead() {
    local name="$1"
    shift
    if ! wanted ahead; then return; fi
    parts+="$name "
    start "$name" 300 env TORCHINDUCTOR_COMPILE_THREADS=4 "$python" benchmarks/gpu_compile.py \
        "${size[@]}" "${four[@]}" "${compiled[@]}" "$@"
}
to_images="stage.flows=[image-to-image,text-to-image]" to_text="stage.flows=[image-to-text,text-to-text]"
# Seconds beside the compiler's minutes: whether what no GPU has run yet runs at all.
tiny=("$python" benchmarks/gpu_graphs.py --device "$device" "${small[@]}")
start replays 150 "${tiny[@]}" eager recomputed compiled --output "$work/json/replays.json"
start update 100 "${tiny[@]}" update --output "$work/json/update.json"
for how in low high; do
    ahead "ahead_$how" "$to_images" resolution="${!how}"
    ahead "ahead_text_$how" "$to_text" resolution="${!how}"
    if [ "$preset" = h100 ]; then
        # Its memory holds one resolution at a time.
        finish "ahead_$how"
        finish "ahead_text_$how"
    fi
done
part resume 60 "${check[@]}" resume "${on[@]}" "${eager[@]}" --output "$work/json/resume.json"
finish update
finish replays
if [[ " ${failed[*]} " == *" replays "* ]]; then
    echo "== CUDA graphs cannot be recorded here: the same parts without them"
    recorded=no graphs=()
    parts="${parts// graphs / compiled }" parts="${parts// graphs_high / compiled_high }" parts="${parts// graphs_/ }"
fi
for name in ahead_low ahead_text_low ahead_high ahead_text_high; do finish "$name"; done

bench part graphs 300 "${four[@]}" "${compiled[@]}" "${graphs[@]}" resolution="$low"
bench part graphs_high 300 "${four[@]}" "${compiled[@]}" "${graphs[@]}" resolution="$high"
cached=(data.latents=cached)
bench part cached 100 "${four[@]}" "${compiled[@]}" resolution="$low" "${cached[@]}"
bench part graphs_cached 100 "${four[@]}" "${compiled[@]}" "${graphs[@]}" resolution="$low" "${cached[@]}"
bench part graphs_cached_high 100 "${four[@]}" "${compiled[@]}" "${graphs[@]}" resolution="$high" "${cached[@]}"
bench part graphs_text_to_image_high 150 "${text_to_image[@]}" "${compiled[@]}" "${graphs[@]}" resolution="$high" \
    "${cached[@]}" "${double_high[@]}"
part losses 150 "${check[@]}" losses "${on[@]}" "${eager[@]}" "${wide[@]}" --other "${compiled[*]} ${graphs[*]}" \
    --output "$work/json/losses.json"
bench part graphs_text_to_image 150 "${text_to_image[@]}" "${compiled[@]}" "${graphs[@]}" resolution="$low" \
    "${cached[@]}" "${double[@]}"
bench part compiled 300 "${four[@]}" "${compiled[@]}" resolution="$low"
bench part compiled_high 300 "${four[@]}" "${compiled[@]}" resolution="$high"
bench part cached_high 100 "${four[@]}" "${compiled[@]}" resolution="$high" "${cached[@]}"
bench part text_to_image_high 200 "${text_to_image[@]}" "${compiled[@]}" resolution="$high" "${cached[@]}" \
    "${double_high[@]}"
bench part text_to_image 150 "${text_to_image[@]}" "${compiled[@]}" resolution="$low" "${cached[@]}" "${double[@]}"
bench part eager 90 "${four[@]}" "${eager[@]}" resolution="$low"
bench part eager_high 90 "${four[@]}" "${eager[@]}" resolution="$high"
bench part text_to_image_eager 60 "${text_to_image[@]}" "${eager[@]}" resolution="$low" "${cached[@]}" \
    "${double[@]}"
bench part text_to_image_high_eager 60 "${text_to_image[@]}" "${eager[@]}" resolution="$high" "${cached[@]}" \
    "${double_high[@]}"
part commands 90 "${check[@]}" commands "${on[@]}" "${eager[@]}" --output "$work/json/commands.json"
part probes 60 "$python" benchmarks/gpu_probes.py --device "$device" "${small[@]}" --output "$work/json/probes.json"

echo "== $SECONDS s; results in $out: gpu.json, gpu.log"
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'error: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
