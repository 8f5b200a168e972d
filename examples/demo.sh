#!/usr/bin/env bash
# The whole of vdtrain in miniature: metadata -> tar shards -> three stages of training -> images and captions.
# `make demo` runs it. Every command can be typed by hand, and each continues from what an earlier run completed.
# Everything is written below demo/. To start from nothing, remove that folder.
set -euo pipefail
export OMP_NUM_THREADS=1  # two processes on two cores

length=${DEMO_LENGTH:-short}
runs=demo/runs-$length
# Pairs that each stage trains at 32 and at 64 pixels, and the scale of the last stage's learning rate. Its text layers
# start at random, and a short run gives them only a few hundred steps.
case $length in
    short) pairs=("9600 1920" "9600 1920" "19200 1280") rate=40 samples=64 every=3840 ;;
    long) pairs=("64000 64000" "32000 96000" "57600 128000") rate=20 samples=200 every=16000 ;;
    *) echo "error: DEMO_LENGTH=$length: choose short or long" >&2; exit 2 ;;
esac
phases() { echo "stage.phases=[{resolution:32,samples:$1},{resolution:64,samples:$2}]"; }

# 1. Draw the images and their metadata, one table in LAION-2B-en's schema and one in COYO-700M's.
python -m miniature draw data=shapes

# 2. Serve the images on this machine. Select rows of the metadata, download their images with img2dataset into tar
#    shards, and check and index the shards.
python -m miniature serve data=shapes &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
python -m data_pipeline select data=shapes
python -m data_pipeline download data=shapes
python -m data_pipeline index data=shapes
kill $server

# 3. Train the three stages under ZeRO on two processes: gpus=2 starts them, here on the CPU. Each stage starts from the
#    checkpoint of the one before. On the way, $runs/STAGE/samples shows what the same captions and images become, and
#    held-out pairs give a second loss.
watch="data.validation.share=0.05 validation.every=$every validation.time_share=null validation.pairs=16"
watch="$watch samples.every=$every samples.time_share=null samples.steps=10"
train() {
    # shellcheck disable=SC2086 # several settings
    vdtrain train gpus=2 model=tiny data=shapes hardware=cpu tracking=offline runs_dir="$runs" $watch "$@"
}
train stage=stage1_single_flow "$(phases ${pairs[0]})"
train stage=stage2_dual_flow "$(phases ${pairs[1]})"
train stage=stage3_four_flow "$(phases ${pairs[2]})" optimizer.learning_rate_scale=$rate

# 4. Make two images from captions, then measure all four flows.
vdtrain sample "$runs/stage3_four_flow" "a red circle on a white background" "a large blue star" \
    resolution=64 guidance_scale=3 steps=25 output_dir="$runs/samples"
python examples/demo_report.py "$runs" "$samples"

# 5. One page of all that: curves, samples, starts and settings.
vdtrain report "$runs"
