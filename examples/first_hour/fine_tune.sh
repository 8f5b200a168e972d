#!/usr/bin/env bash
# Fine-tuning on a folder of captioned images at tiny size, by the commands of docs/finetune.md, to the export.
#   bash examples/first_hour/fine_tune.sh [FOLDER]        from the root of a fresh clone with its environment
# Everything is written to FOLDER, demo/fine_tune by default.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
folder=${1:-demo/fine_tune}
mkdir -p "$folder"
cd "$folder"
# What makes it tiny; at full size the commands have none of these words.
size="data.pack.image_size=64 data.pack.min_image_size=32"
tiny="model=tiny hardware=cpu tracking=offline stage.global_batch_size=8 optimizer.warmup_samples=0 log_every_steps=1"
few="resolution=64 steps=4"
phases() { echo "stage.phases=[{resolution:64,samples:$1}]"; }

# The reader has images with captions beside them. Here they are drawn.
python - <<'END'
from pathlib import Path

import numpy as np
from PIL import Image

from miniature.shapes import caption, draw, sample_scene

generator = np.random.default_rng(0)
Path("photos").mkdir(exist_ok=True)
for number in range(64):
    scene = sample_scene(generator)
    Image.fromarray(draw(scene, 96)).save(f"photos/{number:04d}.jpg")
    Path(f"photos/{number:04d}.txt").write_text(caption(scene, generator))
END

PS4='$ '
set -x
python -m data_pipeline pack photos $size
python -m data_pipeline index data=own data.shards=data/own/packed
python -m data_pipeline inspect data/own/manifest data.inspect.overwrite=true
{ set +x; } 2>/dev/null

# The reader has the released weights, or imports them from the hub. Here a model of two steps stands for them.
vdtrain train stage=stage3_four_flow data=own $tiny stage.init_from=null "$(phases 16)" run_dir=released
[ -e vd-four-flow-v1-0.pth ] || vdtrain weights export versatile_diffusion vd-four-flow-v1-0.pth released

set -x
[ -e weights/versatile_diffusion ] || vdtrain weights import versatile_diffusion vd-four-flow-v1-0.pth model=tiny
vdtrain plan stage=finetune_four_flow data=own $tiny "$(phases 32)" gpus=1
vdtrain preflight stage=finetune_four_flow data=own $tiny "$(phases 32)"
vdtrain train stage=finetune_four_flow data=own $tiny "$(phases 32)"
vdtrain sample runs/finetune_four_flow "a red circle" $few
vdtrain sample runs/finetune_four_flow samples/0000.png flow=image-to-text $few
vdtrain weights export versatile_diffusion mine.pth runs/finetune_four_flow precision=fp16
vdtrain weights export diffusers mine-diffusers runs/finetune_four_flow
