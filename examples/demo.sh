#!/usr/bin/env bash
# The whole of vdtrain in miniature: metadata -> tar shards -> three stages of training -> pictures and captions.
# `make demo` runs it; every command can be typed by hand, and each takes up whatever an earlier run left complete.
# Everything is written below demo/; to start from nothing, remove that folder.
set -euo pipefail

# How long each stage trains, in multiples of the miniature curriculum (conf/model/tiny.yaml).
case "${DEMO_LENGTH:-short}" in
    short) scales=(1 1 1) samples=64 ;;
    long) scales=(8 8 8) samples=200 ;;
    *) echo "error: DEMO_LENGTH=$DEMO_LENGTH: choose short or long" >&2; exit 2 ;;
esac
runs=demo/runs-${DEMO_LENGTH:-short}

# 1. Draw the pictures and their metadata, one table in LAION-2B-en's schema and one in COYO-700M's.
python -m data_pipeline shapes data=shapes

# 2. Serve the pictures on this machine, download them with img2dataset into tar shards, and index the shards.
python -m data_pipeline serve data=shapes &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
python -m data_pipeline download data=shapes
python -m data_pipeline index data=shapes
kill $server

# 3. Train the three stages, each on two processes under ZeRO, each from the checkpoint of the one before.
train() {
    torchrun --standalone --nproc-per-node=2 -m vdtrain.train \
        model=tiny data=shapes hardware=cpu tracking=offline runs_dir="$runs" "$@"
}
train stage=stage1_single_flow stage.samples_scale="${scales[0]}"
train stage=stage2_dual_flow stage.samples_scale="${scales[1]}"
train stage=stage3_four_flow stage.samples_scale="${scales[2]}"

# 4. Make a picture from a caption, then measure all four flows.
vdtrain sample checkpoint="$runs/stage3_four_flow" flow=text-to-image resolution=64 guidance_scale=3 \
    'inputs=["a red circle on a white background", "a large blue star"]' output_dir="$runs/samples"
python examples/demo_report.py "$runs" "$samples"
