#!/usr/bin/env bash
# A third modality at tiny size, by the commands of docs/modalities.md: nine flows with sounds.
#   bash examples/first_hour/modality.sh        from the root of a fresh clone with its environment
# Everything is written below demo/audio. The example's tars are drawn; the reader has tars of another program.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
# What makes it tiny; the page's commands have none of these words.
tiny="stage.phases=[{resolution:32,samples:96}] log_every_steps=1 tracking=none"
few="resolution=32 steps=4 device=cpu"

PS4='$ '
set -x
export PYTHONPATH=.
python -m examples.audio.draw demo/audio/shards --scale 0.1
python -m examples.audio.train_vae demo/audio/vae.safetensors --steps 20
python -m data_pipeline index data=tones 'hydra.searchpath=[examples/audio/conf]'
vdtrain train 'hydra.searchpath=[examples/audio/conf]' model=tiny_with_audio data=tones stage=nine_flow hardware=cpu \
    runs_dir=demo/audio/runs $tiny
{ set +x; } 2>/dev/null

# From a caption first: its picture and its sound are the inputs of the other six flows.
sample() {
    (set -x; vdtrain sample demo/audio/runs/nine_flow "$1" flow="$2" $few 'trust=[examples.audio]' \
        output_dir="demo/audio/samples/$2")
}
for output in text image audio; do
    sample "a high trill" text-to-$output
done
for output in text image audio; do
    sample demo/audio/samples/text-to-image/0000.png image-to-$output
    sample demo/audio/samples/text-to-audio/0000.wav audio-to-$output
done
